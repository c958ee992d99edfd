"""`lora_linear` and its gradients in torch, on matrices: x [T, in], ids and gates [T, k].

On the CPU the values of ids are at hand, so each chosen expert is visited once, with its own tokens, and nothing of the other adapters is
read. Elsewhere reading ids would wait for the device: there every adapter is applied to every token, in a few large products, and what a
token did not choose is multiplied by 0.

Numbers. Factors, gates and scaling are used in float32 (float64 where x is), never folded into 16-bit factors. On the CPU, up to 16 tokens,
y is rounded once: W x is taken as round(W x) plus its rounded residual, two passes over W as it is stored, which cost a third of one pass
that widens it. Otherwise 16-bit y is rounded twice: W x, then the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from fusedmerge.ops.arguments import Operands, wide_dtype

__all__ = ["DECODE_TOKENS", "Gradients", "all_adapters", "all_adapters_backward", "by_expert", "by_expert_backward", "product"]

DECODE_TOKENS = 16  # up to here a call is a decode step: one rounding, and on a GPU one pass over W


class Gradients(NamedTuple):
    """Of all operands but weight and bias, whose gradients need no adapter; None where one was not asked for."""

    x: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    gates: torch.Tensor | None
    scaling: torch.Tensor | None


# ---------------------------------------------------------------------- by expert


def by_expert(operands: Operands) -> torch.Tensor:
    """y [T, out] on the CPU. Where no token has an adapter, the call is the backbone's."""
    return _few_tokens(operands) if len(operands.x) <= DECODE_TOKENS else _many_tokens(operands)


def _few_tokens(operands: Operands) -> torch.Tensor:
    """One rounding. A decode step has little to compute, so its ids and gates are sorted in Python: a tensor operation costs more."""
    x, weight, a, b, ids, gates, scaling, bias = operands
    scales = [1.0] * len(a) if scaling is None else scaling.tolist()
    chosen: dict[int, list[tuple[int, float]]] = {}  # expert -> (token, coefficient) pairs
    for token, pairs in enumerate(zip(ids.tolist(), gates.tolist(), strict=True)):
        for expert, gate in zip(*pairs, strict=True):
            if expert >= 0 and gate * scales[expert]:
                chosen.setdefault(expert, []).append((token, gate * scales[expert]))
    active = sorted({token for members in chosen.values() for token, _ in members})
    if x.dtype == wide_dtype(x) or not active:
        y = linear(x, weight, bias)
    elif len(active) == len(x):
        y = _linear_float32(x, weight)
        y = y if bias is None else y.add_(bias)
    else:  # the others get the backbone's bits
        y = linear(x, weight, bias)
        y[active] = _few_tokens(operands._replace(x=x[active], ids=ids[active], gates=gates[active]))
        return y
    x_wide = x.to(y.dtype)
    for expert, members in chosen.items():
        a_wide, b_wide = a[expert].to(y.dtype), b[expert].to(y.dtype)
        if len(x) == len(members) == 1:
            y.addmm_(linear(x_wide, a_wide) * members[0][1], b_wide.T)
        else:
            tokens, coefficients = torch.tensor([t for t, _ in members]), y.new_tensor([[c] for _, c in members])
            y.index_add_(0, tokens, linear(linear(x_wide[tokens], a_wide) * coefficients, b_wide))
    return y.to(x.dtype)


def _many_tokens(operands: Operands) -> torch.Tensor:
    """Two roundings where x is of 16 bits: W x, then the sum."""
    x, weight, a, b, ids, _, _, bias = operands
    y, coefficients = linear(x, weight, bias), _coefficients(operands)
    delta, x_wide = coefficients.new_zeros(y.shape), x.to(coefficients.dtype)
    for expert, pairs in _groups(torch.where(coefficients != 0, ids, -1), len(a)):
        tokens = pairs // ids.shape[1]
        z = linear(x_wide[tokens], a[expert].to(x_wide.dtype)) * coefficients.reshape(-1)[pairs, None]  # [n, r]
        delta.index_add_(0, tokens, linear(z, b[expert].to(z.dtype)))
    return delta.add_(y).to(x.dtype)


def by_expert_backward(grad: torch.Tensor, operands: Operands, needs: Sequence[bool]) -> Gradients:
    """The gradients that are needed, in the order of `Gradients`, on the CPU; grad [T, out]."""
    x, weight, a, b, ids, *_ = operands
    wide = wide_dtype(x)
    coefficients, grad_wide, x_wide = _coefficients(operands), grad.to(wide), x.to(wide)
    dx = product(grad, weight).to(wide) if needs[0] else None
    da = torch.zeros(a.shape, dtype=wide) if needs[1] else None
    db = torch.zeros(b.shape, dtype=wide) if needs[2] else None
    dots = coefficients.new_zeros(ids.numel())  # the gradient of each (token, slot) pair's coefficient
    of_coefficients = needs[3] or needs[4]
    for expert, pairs in _groups(_chosen(ids, len(a)), len(a)):
        tokens, coefficient = pairs // ids.shape[1], coefficients.reshape(-1)[pairs, None]
        a_wide, b_wide = a[expert].to(wide), b[expert].to(wide)
        if db is not None or of_coefficients:
            z = linear(x_wide[tokens], a_wide)  # [n, r]
        if dx is not None or da is not None or of_coefficients:
            u = grad_wide[tokens] @ b_wide  # [n, r]
        if dx is not None:
            dx.index_add_(0, tokens, (u * coefficient) @ a_wide)
        if da is not None:
            da[expert] = (u * coefficient).T @ x_wide[tokens]
        if db is not None:
            db[expert] = grad_wide[tokens].T @ (z * coefficient)
        if of_coefficients:
            dots[pairs] = (z * u).sum(dim=1)
    return _in_operands_dtypes(operands, needs, dx, da, db, dots.view(ids.shape))


def _groups(ids: torch.Tensor, num_adapters: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that ids [T, k] choose, in ascending order, with the places of its (token, slot) pairs in the flattened ids."""
    flat = ids.reshape(-1).long()
    counts = torch.bincount(flat + 1, minlength=num_adapters + 1).tolist()
    for expert, pairs in enumerate(torch.argsort(flat, stable=True).split(counts), start=-1):
        if expert >= 0 and len(pairs):
            yield expert, pairs


def _linear_float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """W x of 16-bit operands in float32, within 2^-16 |W| |x|."""
    y = linear(x, weight)
    scale = 1024.0 if x.dtype == torch.float16 else 1.0  # lifts the residual out of float16's subnormal numbers; it cannot overflow
    residual = torch.addmm(y.neg(), x, weight.T, beta=scale, alpha=scale).float() / scale
    return y.float() + torch.where(y.isfinite(), residual, 0.0)


# ---------------------------------------------------------------------- all adapters at once


def all_adapters(operands: Operands) -> torch.Tensor:
    """y [T, out] on any device. An id outside [-1, N) counts as no adapter."""
    x, weight, a, b, _, _, _, bias = operands
    wide = wide_dtype(x)
    z = torch.einsum("ti,nri->tnr", x.to(wide), a.to(wide)) * _per_adapter(operands)
    return (linear(x, weight, bias) + torch.einsum("tnr,nor->to", z, b.to(wide))).to(x.dtype)


def all_adapters_backward(grad: torch.Tensor, operands: Operands, needs: Sequence[bool]) -> Gradients:
    """The gradients that are needed, in the order of `Gradients`, on any device; differentiable in turn."""
    x, weight, a, b, ids, *_ = operands
    wide = wide_dtype(x)
    grad_wide, x_wide, a_wide, b_wide = grad.to(wide), x.to(wide), a.to(wide), b.to(wide)
    per_adapter = _per_adapter(operands)
    z = torch.einsum("ti,nri->tnr", x_wide, a_wide)
    u = torch.einsum("to,nor->tnr", grad_wide, b_wide)
    dx = product(grad, weight) + torch.einsum("tnr,nri->ti", u * per_adapter, a_wide) if needs[0] else None
    da = torch.einsum("tnr,ti->nri", u * per_adapter, x_wide) if needs[1] else None
    db = torch.einsum("tnr,to->nor", z * per_adapter, grad_wide) if needs[2] else None
    chosen = _chosen(ids, len(a))
    dots = torch.where(chosen >= 0, (z * u).sum(dim=2).gather(1, chosen.clamp_min(0)), 0.0)  # [T, k]
    return _in_operands_dtypes(operands, needs, dx, da, db, dots)


def _per_adapter(operands: Operands) -> torch.Tensor:
    """Each adapter's coefficient for each token, [T, N, 1]; duplicates add."""
    coefficients, num_adapters = _coefficients(operands), len(operands.a)
    index = _chosen(operands.ids, num_adapters).clamp_min(0)
    return coefficients.new_zeros(len(index), num_adapters).scatter_add(1, index, coefficients)[..., None]


# ---------------------------------------------------------------------- both


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right; in float32 for float16 on the CPU, where torch rounds every partial sum of such a product to float16."""
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return left.float() @ right.float()
    return left @ right


def _chosen(ids: torch.Tensor, num_adapters: int) -> torch.Tensor:
    """ids as int64, -1 for whatever counts as no adapter."""
    return torch.where((ids >= 0) & (ids < num_adapters), ids, -1).long()


def _scales(operands: Operands, chosen: torch.Tensor) -> torch.Tensor:
    """scaling of each (token, slot) pair, [T, k]."""
    wide = wide_dtype(operands.x)
    if operands.scaling is None or not len(operands.scaling):
        return torch.ones(chosen.shape, dtype=wide, device=chosen.device)
    return operands.scaling.to(wide)[chosen.clamp_min(0)]


def _coefficients(operands: Operands) -> torch.Tensor:
    """gate * scaling of each (token, slot) pair, [T, k]; 0 for no adapter."""
    chosen = _chosen(operands.ids, len(operands.a))
    return torch.where(chosen >= 0, operands.gates.to(wide_dtype(operands.x)) * _scales(operands, chosen), 0.0)


def _in_operands_dtypes(
    operands: Operands,
    needs: Sequence[bool],
    dx: torch.Tensor | None,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
    dots: torch.Tensor,
) -> Gradients:
    """The gradients in their operands' dtypes, with those of gates and scaling from `dots` [T, k]: the gradients of the coefficients."""
    x, _, a, b, ids, gates, scaling, _ = operands
    chosen = _chosen(ids, len(a))
    dgates = (dots * _scales(operands, chosen)).to(gates.dtype) if needs[3] else None
    dscaling = None
    if needs[4] and scaling is not None:
        products = torch.where(chosen >= 0, dots * gates.to(dots.dtype), 0.0).reshape(-1)
        sums = dots.new_zeros(len(a) + 1).scatter_add(0, chosen.reshape(-1) + 1, products)  # the first: of no adapter
        dscaling = sums[1:].to(scaling.dtype, copy=True)  # of its own memory, as the fake kernel says
    dx, da, db = (None if d is None else d.to(operand.dtype) for d, operand in ((dx, x), (da, a), (db, b)))
    return Gradients(dx, da, db, dgates, dscaling)
