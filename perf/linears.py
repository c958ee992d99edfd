"""One linear with adapters: tokens and their routes, torch's ways to apply them, and the check against float64 truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fusedmerge as fm
from perf import model
from perf.model import Cost

if TYPE_CHECKING:
    import torch

__all__ = ["GATHERED_BYTES", "POPULARITIES", "Problem", "check", "check_added", "grouped", "make", "make_weight", "routes"]

POPULARITIES = ("distinct", "uniform", "zipf", "skewed", "identical")  # after Punica (arXiv 2310.18547, section 7)
MOST_CHECKED = 64  # tokens
GATHERED_BYTES = 2 << 30  # a gather of more than that is not tried
HALF_ULP, ACCUMULATED = 2.0**-8, 2.0**-16  # of bfloat16, relative; of the sum of the terms' sizes


@dataclass(frozen=True)
class Problem:
    """Tokens, adapters, and who takes which. The scaling is 1."""

    x: torch.Tensor  # [T, in]
    a: torch.Tensor  # [N, r, in]
    b: torch.Tensor  # [N, out, r]
    ids: torch.Tensor  # int32 [T, k]
    gates: torch.Tensor  # float32 [T, k]

    @property
    def experts(self) -> int:
        """How many different ones the tokens take."""
        return int(self.ids[self.ids >= 0].unique().numel())

    @property
    def whole(self) -> Cost:
        """W x and the adapters."""
        (tokens, cols), (_, rows, r), k = self.x.shape, self.b.shape, self.ids.shape[1]
        return model.lora_linear(rows, cols, r, len(self.a), k, tokens, self.experts)

    @property
    def alone(self) -> Cost:
        """W x."""
        return model.linear(self.b.shape[1], self.x.shape[1], len(self.x))

    @property
    def added(self) -> Cost:
        """The adapters, W x being there."""
        (tokens, cols), (_, rows, r), k = self.x.shape, self.b.shape, self.ids.shape[1]
        return model.adapters(rows, cols, r, k, tokens, self.experts)

    @property
    def gathered_bytes(self) -> int:
        """Of the factors that `gathered` copies."""
        return self.ids.numel() * (self.a[0].nbytes + self.b[0].nbytes)

    def fused(self, weight: torch.Tensor) -> torch.Tensor:
        """By this library."""
        return fm.lora_linear(self.x, weight, self.a, self.b, self.ids, self.gates)

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        """By torch: the chosen factors gathered for each token, two batched products and a sum, in x's dtype as PEFT computes it."""
        import torch

        ids = self.ids.long()
        z = self.a[ids] @ self.x[:, None, :, None]  # [T, k, r, 1]
        each = (self.b[ids] @ z).squeeze(-1) * self.gates[..., None].to(z.dtype)  # [T, k, out]
        return torch.nn.functional.linear(self.x, weight) + each.sum(dim=1)

    def merged_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W with the first token's mixture in it."""
        wide = weight.float()
        for slot, gate in zip(self.ids[0].tolist(), self.gates[0].tolist(), strict=True):
            wide = wide.addmm(self.b[slot].float(), self.a[slot].float(), alpha=gate)
        return wide.to(weight.dtype)


def make(
    rows: int, cols: int, tokens: int, num_adapters: int, r: int, k: int, where: torch.device, popularity: str = "uniform",
    gates: bool = True, seed: int = 0,
) -> Problem:  # fmt: skip
    """Random signed bfloat16 data. gates: random ones; else 1 each, as peers without gates have it."""
    import torch

    generator = torch.Generator(where).manual_seed(seed)

    def random(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=where).normal_(0.0, spread, generator=generator)

    a, b = random(num_adapters, r, cols, spread=cols**-0.5), random(num_adapters, rows, r, spread=0.1)
    ids = routes(popularity, tokens, num_adapters, k, seed).to(where)
    share = torch.rand(ids.shape, device=where, generator=generator) if gates else torch.ones(ids.shape, device=where)
    return Problem(random(tokens, cols), a, b, ids, share)


def make_weight(rows: int, cols: int, where: torch.device, seed: int = 0) -> torch.Tensor:
    """A random bfloat16 matrix whose products are about as large as x."""
    import torch

    generator = torch.Generator(where).manual_seed(seed)
    return torch.empty(rows, cols, dtype=torch.bfloat16, device=where).normal_(0.0, cols**-0.5, generator=generator)


def routes(popularity: str, tokens: int, num_adapters: int, k: int, seed: int = 0) -> torch.Tensor:
    """int32 [T, k] (at most N of them), a token's ids being different ones.

    distinct: every token the next k adapters, in turn; uniform: all adapters alike; zipf: adapter e with 1 / (e + 1); skewed: half of all
    choices fall on the first; identical: the first k for everybody.
    """
    import torch

    k = min(k, num_adapters)
    rank = torch.arange(num_adapters, dtype=torch.float64)
    if popularity == "identical":
        return torch.arange(k, dtype=torch.int32).expand(tokens, k).contiguous()
    if popularity == "distinct":
        return ((torch.arange(tokens)[:, None] * k + torch.arange(k)) % num_adapters).int()
    weights = {
        "uniform": torch.ones_like(rank),
        "zipf": 1 / (rank + 1),
        "skewed": torch.where(rank == 0, max(1, num_adapters - 1), 1).double(),
    }[popularity]
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights.expand(tokens, -1), k, generator=generator).int()


def grouped(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    """By torch: W x, and for each adapter the tokens that chose it gathered, multiplied and added, as PEFT does it for a mixed batch.

    Which tokens chose which adapter is found beforehand: on a GPU it waits for the device.
    """
    import torch

    chosen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for slot in problem.ids.unique().tolist():
        place = (problem.ids == slot).nonzero()  # [pairs, 2]
        chosen.append((slot, place[:, 0], problem.gates[place[:, 0], place[:, 1], None].to(problem.x.dtype)))

    def run(weight: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(problem.x, weight)
        for slot, tokens, gates in chosen:
            y.index_add_(0, tokens, (problem.x[tokens] @ problem.a[slot].T @ problem.b[slot].T) * gates)
        return y

    return run


def check(y: torch.Tensor, weight: torch.Tensor, problem: Problem, roundings: Sequence[str] | None = None) -> dict[str, float]:
    """The largest error of y [T, out] over its bound: half an ulp of y and 2^-16 of the terms' sizes; beyond 16 tokens half an ulp of W x,
    which is stored in between. roundings, where others are due: of "y", "plain" (W x), "z" (and each expert's output, as PEFT does it),
    "w" (merged weights).

    Raises AssertionError beyond 1.
    """
    plain, delta, *sizes = _truth(problem, weight)
    return _judged(y, plain, delta, *sizes, roundings or (("y",) if len(problem.x) <= 16 else ("y", "plain")))


def check_added(y: torch.Tensor, before: torch.Tensor, problem: Problem, roundings: Sequence[str] = ("y",)) -> dict[str, float]:
    """`check` for adapters that were added to what was there."""
    _, delta, _, size = _truth(problem, None)
    plain = before[_checked(len(before))].double()
    return _judged(y, plain, delta, plain.abs(), size, roundings)


def _judged(
    y: torch.Tensor, plain: torch.Tensor, delta: torch.Tensor, plain_size: torch.Tensor, delta_size: torch.Tensor, roundings: Sequence[str]
) -> dict[str, float]:
    size = plain_size + delta_size
    half = {"y": (plain + delta).abs(), "plain": plain.abs(), "z": delta_size, "w": size}
    bound = HALF_ULP * sum(half[name] for name in roundings) + ACCUMULATED * size
    worst = float(((y[_checked(len(y))].double() - (plain + delta)).abs() / bound).nan_to_num(float("inf")).max())
    assert worst <= 1.0, f"an error of {worst:.3g} times the bound"
    return {"of_bound": worst}


def _truth(problem: Problem, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W x, what the adapters add, and the sums of both's terms' sizes, float64 [tokens that are checked, out]."""
    import torch

    tokens = _checked(len(problem.x))
    x, ids, gates = problem.x[tokens].double(), problem.ids[tokens], problem.gates[tokens].double()
    delta = torch.zeros(len(x), problem.b.shape[1], dtype=torch.float64, device=x.device)
    plain, plain_size, size = delta.clone(), delta.clone(), delta.clone()
    if weight is not None:
        plain, plain_size = x @ weight.double().T, x.abs() @ weight.double().abs().T
    for slot in ids[ids >= 0].unique().tolist():
        share = torch.where(ids == slot, gates, 0.0).sum(dim=1, keepdim=True)
        a, b = problem.a[slot].double(), problem.b[slot].double()
        delta += share * (x @ a.T @ b.T)
        size += share.abs() * (x.abs() @ a.abs().T @ b.abs().T)
    return plain, delta, plain_size, size


def _checked(tokens: int) -> list[int]:
    """Which tokens are compared: all, or so many, spread evenly, the first and the last among them."""
    if tokens <= MOST_CHECKED:
        return list(range(tokens))
    return sorted({round(i * (tokens - 1) / (MOST_CHECKED - 1)) for i in range(MOST_CHECKED)})
