"""Float64 truth in NumPy, written for reading. Tests, benchmarks and the demo compare every backend with these functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fusedmerge.staging import BankTarget

__all__ = ["Float", "FORMATS", "Member", "applied", "applied_bound", "error_bound", "merged", "members", "round_to", "to_float64", "ulp"]

Array = NDArray[np.float64]


class Float(NamedTuple):
    """A binary floating-point format."""

    precision: int  # significant bits, the implicit one included
    min_exponent: int  # log2 of the smallest normal number
    largest: float


FORMATS = {
    "bfloat16": Float(8, -126, (2 - 2**-7) * 2.0**127),
    "float16": Float(11, -14, 65504.0),
    "float32": Float(24, -126, (2 - 2**-23) * 2.0**127),
}


class Member(NamedTuple):
    """One expert of a mixture on one target."""

    a: Array  # [r, cols]
    b: Array  # [rows, r]
    scaling: float
    gate: float


def merged(base: Array, mixture: Sequence[Member]) -> Array:
    """base + sum gate * scaling * B A, [rows, cols] (LoRA-Switch, section 3: the merge before a token is decoded)."""
    out = base.astype(np.float64)
    for expert in mixture:
        out = out + expert.gate * expert.scaling * (expert.b @ expert.a)
    return out


def magnitude(base: Array, mixture: Sequence[Member]) -> Array:
    """S = |base| + sum |gate * scaling| |B| |A|: what a float32 accumulation's error is relative to."""
    out = np.abs(base).astype(np.float64)
    for expert in mixture:
        out = out + abs(expert.gate * expert.scaling) * (np.abs(expert.b) @ np.abs(expert.a))
    return out


def ulp(values: Array, dtype: str) -> Array:
    """The distance between neighbours of `dtype` around each value."""
    form = FORMATS[dtype]
    exponent = np.frexp(values)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, form.min_exponent) - form.precision + 1)


def round_to(values: Array, dtype: str) -> Array:
    """Each float64 rounded once to `dtype` (nearest, ties to even; overflow to inf), as float64."""
    spacing = ulp(np.where(np.isfinite(values), values, 1.0), dtype)
    rounded = np.rint(values / spacing) * spacing
    return np.where(np.abs(rounded) > FORMATS[dtype].largest, np.copysign(np.inf, values), rounded)


def error_bound(base: Array, mixture: Sequence[Member], dtype: str) -> Array:
    """How far a merged weight may lie from the truth: half an ulp of the truth + max(2^-18, K 2^-27) S; float32: max(2^-20, K 2^-26) S.

    K is the sum of the experts' ranks, each padded to 16.
    """
    depth = sum(-(-expert.a.shape[0] // 16) * 16 for expert in mixture)
    relative = max(2.0**-20, depth * 2.0**-26) if dtype == "float32" else max(2.0**-18, depth * 2.0**-27)
    return 0.5 * ulp(merged(base, mixture), dtype) + relative * magnitude(base, mixture)


def applied(
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    ids: NDArray[np.integer],
    gates: Array,
    scaling: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """`lora_linear` on x [T, in], ids and gates [T, k]: each token's experts beside the linear, not merged. y [T, out]."""
    y = x @ weight.T + (0.0 if bias is None else bias)
    for token, slot in np.ndindex(*ids.shape):
        expert = ids[token, slot]
        if expert >= 0:
            coefficient = gates[token, slot] * (1.0 if scaling is None else scaling[expert])
            y[token] += coefficient * (b[expert] @ (a[expert] @ x[token]))
    return y


def applied_bound(y: Array, backbone: Array, magnitude: Array, dtype: str) -> Array:
    """How far `lora_linear` may lie from the truth y [T, out]: half an ulp + 2^-16 S (float32: 2^-18 S).

    Above 16 tokens 16-bit values are rounded twice, which adds half an ulp of backbone = W x + bias.
    magnitude: S = |W| |x| + |bias| + sum |gate scaling| |B| |A| |x|, which is `applied` on the absolute values.
    """
    before = (2.0**-18 if dtype == "float32" else 2.0**-16) * magnitude
    if dtype != "float32" and len(y) > 16:
        before = before + 0.5 * ulp(backbone, dtype)
    return before + 0.5 * ulp(np.abs(y) + before, dtype)  # the last rounding is of what was computed, not of y


def to_float64(tensor: torch.Tensor) -> Array:
    """A tensor's exact values."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def members(target: BankTarget, mixture: Sequence[tuple[int, float]]) -> list[Member]:
    """The experts of a mixture [(slot, gate), ...] on one target of a bank, as stored; gates are narrowed to float32 as the switch does."""
    found = []
    for slot, gate in mixture:
        rank = target.ranks[slot]
        a, b = to_float64(target.a[slot, :rank]), to_float64(target.b[slot, :, :rank])
        found.append(Member(a, b, float(target.scaling[slot]), float(np.float32(gate))))
    return found
