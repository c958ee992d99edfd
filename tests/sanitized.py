"""A small switch and a small lora_linear, right or not: what `make gpu PART=sanitize` puts under compute-sanitizer.

    python -m tests.sanitized jit        (or aot; cpu and sim run where there is no GPU)

Ragged shapes, unaligned rows, ranks beyond one chunk, both modes; every number against float64.
"""

from __future__ import annotations

import os
import sys

import torch

import fusedmerge as fm
from tests import kit

SHAPES = [(1, 1), (67, 131), (129, 264)]
MIXTURES = [[(0, 0.7), (2, 0.3)], [(1, -1.3)], [], [(0, 0.4), (1, -0.3), (2, 0.2), (3, 0.1)]]


def switches() -> None:
    """Every mixture merged in turn, then the base again."""
    for mode in ("exact", "inplace"):
        for ranks in ((4, 7, 16, 33), (64, 128, 100, 128)):
            weights = kit.make_weights(SHAPES)
            bank = kit.make_bank(weights, ranks=ranks)
            base = {name: weight.clone() for name, weight in weights.items()}
            switcher = fm.Switcher(weights, bank, mode)
            for mixture in MIXTURES if mode == "exact" else MIXTURES[:1]:  # in place, later switches round again
                switcher.switch({f"a{slot}": gate for slot, gate in mixture})
                for name, live in weights.items():
                    kit.assert_merged(live, base[name], bank.target(name), mixture, share=0.99)
            switcher.restore()
            if mode == "exact":
                assert kit.snapshot(weights) == kit.snapshot(base), "restore"


def linears() -> None:
    """Tokens with adapters of their own, and with none."""
    for tokens in (1, 5, 17):
        generator = torch.Generator().manual_seed(tokens)
        shapes = {"x": (tokens, 264), "weight": (131, 264), "a": (4, 16, 264), "b": (4, 131, 16)}
        made = {name: torch.randn(*shape, generator=generator, device="cpu").to(torch.bfloat16) for name, shape in shapes.items()}
        ids = torch.randint(-1, 4, (tokens, 2), generator=generator, device="cpu", dtype=torch.int32)
        gates = torch.randn(tokens, 2, generator=generator, device="cpu")
        where = torch.get_default_device()
        y = fm.lora_linear(*(tensor.to(where) for tensor in made.values()), ids.to(where), gates.to(where)).cpu().double()
        x, weight, a, b = (tensor.double() for tensor in made.values())
        truth, size = x @ weight.T, x.abs() @ weight.abs().T
        rounded = truth.abs()  # where a library multiplies, W x is rounded once by itself
        for token, slot in ((t, j) for t in range(tokens) for j in range(2) if ids[t, j] >= 0):
            expert, gate = int(ids[token, slot]), float(gates[token, slot])
            truth[token] += gate * (b[expert] @ (a[expert] @ x[token]))
            size[token] += abs(gate) * (b[expert].abs() @ (a[expert].abs() @ x[token].abs()))
        wrong = (y - truth).abs() > 2**-8 * (truth.abs() + rounded) + 2**-16 * size
        assert not wrong.any(), f"lora_linear, {tokens} tokens: {int(wrong.sum())} wrong"


def main(backend: str) -> None:
    os.environ["FUSEDMERGE_BACKEND"] = backend
    status = fm.backends()[backend]
    assert status, status.reason
    if backend in ("jit", "aot"):
        torch.set_default_device("cuda")
    switches()
    linears()
    if backend in ("jit", "aot"):
        torch.cuda.synchronize()
    print(f"{backend}: right")


if __name__ == "__main__":
    main(*sys.argv[1:])
