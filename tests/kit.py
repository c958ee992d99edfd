"""What the tests share: small models' weights, banks over them, and comparison with float64 truth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CORRECT_SHARE = {torch.bfloat16: 0.999, torch.float16: 0.995, torch.float32: 0.0}


def fast_first(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Parameters of which `make test-fast` runs the first ones only. A tuple stands for several arguments."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=[pytest.mark.slow] if i >= fast else []) for i, case in enumerate(cases)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_weights(shapes, dtype=torch.bfloat16, seed=0):
    """{"w0": ..., "w1": ...}: normal weights of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator, device="cpu") * 0.05 for shape in shapes]
    return {f"w{i}": weight.to(torch.get_default_device(), dtype) for i, weight in enumerate(made)}


def make_bank(weights, ranks=(4, 7, 16, 33), dtype=None, seed=1, scaling=0.5):
    """One adapter per rank, of signed normal factors, |delta| about 0.07 |W| times the gate."""
    adapters = [fm.AdapterBank.random(weights, 1, r, seed=seed + index, dtype=dtype) for index, r in enumerate(ranks)]
    stacks = {}
    width = max(ranks)
    for name in adapters[0].targets:
        parts = [bank.target(name) for bank in adapters]
        a = torch.zeros(len(ranks), width, parts[0].a.shape[2], dtype=parts[0].a.dtype)
        b = torch.zeros(len(ranks), parts[0].b.shape[1], width, dtype=parts[0].b.dtype)
        for index, (part, r) in enumerate(zip(parts, ranks, strict=True)):
            a[index, :r] = part.a[0, :r]
            b[index, :, :r] = part.b[0, :, :r] / scaling
        stacks[name] = (a, b)
    return fm.AdapterBank.from_tensors(stacks, scaling, [f"a{index}" for index in range(len(ranks))])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()


def snapshot(weights):
    return {name: bits(tensor) for name, tensor in weights.items()}


def assert_merged(live: torch.Tensor, base: torch.Tensor, target, mixture, share=None) -> None:
    """`live` must be the mixture [(slot, gate), ...] merged into `base`: within the bound, and almost everywhere correctly rounded."""
    dtype = name_of(live.dtype)
    experts = reference.members(target, mixture)
    base64, live64 = reference.to_float64(base), reference.to_float64(live)
    truth = reference.merged(base64, experts)
    error = np.abs(live64 - truth)
    assert np.all(np.isfinite(live64))
    assert np.all(error <= reference.error_bound(base64, experts, dtype)), float((error / reference.ulp(truth, dtype)).max())
    correct = float(np.mean(live64 == reference.round_to(truth, dtype)))
    assert correct >= (CORRECT_SHARE[live.dtype] if share is None else share), correct
