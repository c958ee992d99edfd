"""Operands for `lora_linear` and `route_topk`, and comparison with float64 truth."""

from __future__ import annotations

import numpy as np
import torch

from fusedmerge import reference
from fusedmerge.ops.arguments import Operands

POPULARITIES = ("uniform", "distinct", "zipf", "identical", "sparse", "duplicate", "none")


def make_ids(tokens, k, num_adapters, popularity, rng):
    """Adapter ids [T, k]. "sparse": most places are -1, some tokens are all -1; "duplicate": a token names one adapter k times."""
    ids = np.full((tokens, k), -1)
    for token in range(tokens):
        if popularity == "distinct":
            ids[token] = (token * k + np.arange(k)) % num_adapters
        elif popularity == "zipf":
            ids[token] = np.minimum(rng.zipf(1.6, k) - 1, num_adapters - 1)
        elif popularity in ("uniform", "sparse"):
            ids[token] = rng.integers(0, num_adapters, k)
        elif popularity == "identical":
            ids[token] = np.arange(k) % num_adapters
        elif popularity == "duplicate":
            ids[token] = token % num_adapters
    if popularity == "sparse":
        ids[rng.random((tokens, k)) < 0.6] = -1
        ids[::3] = -1
    return torch.from_numpy(ids.astype(np.int32))


def make(
    tokens=3, k=2, num_adapters=4, r=3, n_in=40, n_out=24, dtype=torch.bfloat16, *,
    popularity="uniform", scaling=True, bias=True, same_sign=False, seed=0,
):  # fmt: skip
    """Signed normal operands. Adapters that no token chooses are full of NaN: nothing may be read from them."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        values = rng.standard_normal(shape) * scale
        return torch.from_numpy(np.abs(values) if same_sign else values).to(dtype)

    ids = make_ids(tokens, k, num_adapters, popularity, rng)
    a, b = normal(num_adapters, r, n_in, scale=max(n_in, 1) ** -0.5), normal(num_adapters, n_out, r, scale=0.1)
    unused = sorted(set(range(num_adapters)) - set(ids.flatten().tolist()))
    a[unused], b[unused] = float("nan"), float("nan")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates = torch.from_numpy(rng.standard_normal((tokens, k))).to(wide)
    scales = torch.from_numpy(rng.uniform(0.25, 2.0, num_adapters)).to(wide) if scaling else None
    x, weight = normal(tokens, n_in), normal(n_out, n_in, scale=max(n_in, 1) ** -0.5)
    return Operands(x, weight, a, b, ids, gates, scales, normal(n_out) if bias else None)


def truth(operands, of=lambda values: values):
    """y [T, out] in float64, of the operands' values or of a function of them."""
    flat = operands.flat()._asdict()
    values = [None if t is None else t.cpu().numpy() if name == "ids" else of(reference.to_float64(t)) for name, t in flat.items()]
    return reference.applied(*values)


def excess(y, operands):
    """The largest error of y [..., out] as a part of what `reference.applied_bound` allows."""
    assert y.dtype == operands.x.dtype
    assert y.shape == (*operands.x.shape[:-1], len(operands.weight))
    expected, magnitude = truth(operands), truth(operands, np.abs)
    backbone = truth(operands._replace(ids=torch.full_like(operands.ids, -1)))
    got = reference.to_float64(y).reshape(expected.shape)
    assert np.all(np.isfinite(got))
    dtype = str(y.dtype).removeprefix("torch.")
    bound = 1e-14 * magnitude if dtype == "float64" else reference.applied_bound(expected, backbone, magnitude, dtype)
    return float(np.max(np.abs(got - expected) / bound, initial=0.0))
