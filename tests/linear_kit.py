"""What the tests of fused application share: random problems, float64 truth, and the bounds of docs/kernels/lora_linear.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fusedmerge import _ext, reference
from fusedmerge.backend.linear import Known, Target
from fusedmerge.reference import to_float64 as wide

SLACK = 2.0**-16  # of the sum of the terms' sizes
ISAS = [isa for isa in _ext.isas() if isa != "amx"]  # whose linears are those of the one before it


@dataclass(frozen=True)
class Problem:
    """Tokens and their slots, and the matrices that they pass through."""

    x: torch.Tensor  # [T, in]
    targets: list[Target]
    ids: torch.Tensor  # int32 [T, k]
    gates: torch.Tensor  # float32 [T, k]

    @property
    def known(self) -> Known:
        return Known(self.ids, self.gates)

    def tokens(self, chosen: list[int]) -> Problem:
        """The same for some of the tokens, in another order."""
        targets = [replace(t, residual=None if t.residual is None else t.residual[chosen].contiguous()) for t in self.targets]
        return Problem(self.x[chosen].contiguous(), targets, self.ids[chosen].contiguous(), self.gates[chosen].contiguous())


def make(
    num_tokens: int,
    cols: int,
    *,
    rows: tuple[int, ...] = (35,),
    ranks: tuple[int, ...] = (16,),
    adapters: int = 5,
    k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    extras: bool = True,
    positive: bool = False,
) -> Problem:
    """Signed normal data, deltas as large as what they are added to; some slots are empty. extras: scaling, bias, residual."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, device="cpu") * size
        return (made.abs() if positive else made).to(torch.get_default_device(), dtype)

    def target(out: int, rank: int) -> Target:
        a, b = normal(adapters, rank, cols, size=cols**-0.5), normal(adapters, out, rank, size=rank**-0.5)
        scaling = (torch.rand(adapters, generator=generator, device="cpu") + 0.5).to(a.device)
        more = {"scaling": scaling, "bias": normal(out), "residual": normal(num_tokens, out)} if extras else {}
        return Target(normal(out, cols, size=cols**-0.5), a, b, **more)

    ids = torch.randint(-1, adapters, (num_tokens, k), generator=generator, device="cpu", dtype=torch.int32)
    gates = torch.randn(num_tokens, k, generator=generator, device="cpu")
    targets = [target(out, rank) for out, rank in zip(rows, ranks * len(rows), strict=False)]
    return Problem(normal(num_tokens, cols), targets, ids.to(targets[0].weight.device), gates.to(targets[0].weight.device))


def truth(x: torch.Tensor, target: Target, known: Known | None) -> tuple[np.ndarray, np.ndarray]:
    """(y, S): the exact sum in float64, and the sum of its products' sizes."""
    operands = [wide(x), wide(target.weight), np.zeros(0), np.zeros(0)]
    ids, gates, scaling = np.zeros((len(x), 0), np.int32), np.zeros((len(x), 0)), None
    if known is not None and target.a is not None and target.b is not None:
        operands[2:], ids, gates = [wide(target.a), wide(target.b)], known.ids.cpu().numpy(), wide(known.gates)
        scaling = None if target.scaling is None else wide(target.scaling)
    exact = reference.applied(*operands, ids, gates, scaling)
    size = reference.applied(*map(np.abs, operands), ids, np.abs(gates), None if scaling is None else np.abs(scaling))
    for more in (target.bias, target.residual):
        exact = exact if more is None else exact + wide(more)
    return exact, size


def cancelled(problem: Problem, known: Known | None) -> Problem:
    """The same with residuals that leave next to nothing of y: what is left shows the sum's own error, which y's rounding would hide."""
    targets = []
    for target in problem.targets:
        exact, _ = truth(problem.x, replace(target, residual=None), known)
        residual = torch.from_numpy(-exact).to(problem.x.device, problem.x.dtype)
        targets.append(replace(target, residual=residual))
    return replace(problem, targets=targets)


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return reference.ulp(values, str(dtype).removeprefix("torch."))


def check(y: torch.Tensor, x: torch.Tensor, target: Target, known: Known | None) -> None:
    """Every y is within half an ulp and SLACK of its terms' sizes."""
    exact, size = truth(x, target, known)
    got = wide(y)
    assert got.shape == exact.shape
    assert np.isfinite(got).all(), "not every y was written, or something was read that was not"
    error = np.abs(got - exact) - 0.5 * ulp(np.maximum(np.abs(exact), np.abs(got)), y.dtype)
    assert (error <= SLACK * size).all(), float((error / size).max() / SLACK)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy()


def poison(monkeypatch) -> None:
    """Results and workspace start as NaN, ids as -7."""
    empty = torch.Tensor.new_empty

    def poisoned(like, *shape, **kwargs):
        made = empty(like, *shape, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -7)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
