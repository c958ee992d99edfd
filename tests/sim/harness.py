"""Drives the simulated switch from NumPy: number types as bit arrays, one `Launch` per table of segments, and the float64 truth.

Weights travel as raw bits (uint16 for bf16 and fp16, uint8 for fp8, float32 as itself), so that bit equality is array equality.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fusedmerge.backend.params import BAD_GATE, BAD_ID, BF16, FLOAT32, FP8, FP16, MAX_SLOTS, NON_FINITE, PlanRequest, PlanResult
from fusedmerge.backend.params import SimOptions as Options
from fusedmerge.backend.params import SwitchParams as Params
from fusedmerge.backend.params import SwitchSegment as Segment
from fusedmerge.backend.params import SwitchState as State

__all__ = ["BAD_GATE", "BAD_ID", "NON_FINITE"]  # for the tests, which take all names from here

STORAGE = {BF16: np.uint16, FP16: np.uint16, FLOAT32: np.float32, FP8: np.uint8}
FRACTION_BITS = {BF16: 7, FP16: 10, FLOAT32: 23}
SMALLEST_EXPONENT = {BF16: -126, FP16: -14, FLOAT32: -126}
_P, _I = ctypes.c_void_p, ctypes.c_int


def options(thread_order: int = 0, tensor_core: int = 1, async_copies: int = 0, resident_blocks: int = 2, seed: int = 1) -> Options:
    return Options(thread_order, tensor_core, async_copies, resident_blocks, seed)


class SimulatorError(RuntimeError):
    """The simulator refused what a kernel did."""


class PlanError(ValueError):
    """The planner refused a request."""


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.fm_sim_error.restype = ctypes.c_char_p
    lib.fm_sim_layout.restype = lib.fm_sim_fault.restype = ctypes.c_char_p
    lib.fm_sim_dot.restype = lib.fm_sim_fp16.restype = lib.fm_sim_fp8.restype = ctypes.c_float
    lib.fm_sim_dot.argtypes = [ctypes.c_float, _P, _P, _I, _I]
    lib.fm_sim_fp16.argtypes = lib.fm_sim_bf16.argtypes = [ctypes.c_float]
    return lib


def encode(values: np.ndarray, number: int) -> np.ndarray:
    """Rounds float values (to nearest even, once, from float64) to the bits of `number`."""
    if number == FLOAT32:
        return values.astype(np.float32)
    if number == FP16:
        return values.astype(np.float16).view(np.uint16)
    if number == BF16:
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    table = decode(np.arange(127, dtype=np.uint8), FP8)
    nearest = np.abs(np.abs(values)[..., None] - table).argmin(-1).astype(np.uint8)
    return np.where(values < 0, nearest | 0x80, nearest).astype(np.uint8)


def decode(bits: np.ndarray, number: int) -> np.ndarray:
    """The float64 values of stored bits."""
    if number == FLOAT32:
        return bits.astype(np.float64)
    if number == FP16:
        return bits.view(np.float16).astype(np.float64)
    if number == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exponent, fraction = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float64)
    size = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    size = np.where(bits & 0x7F == 0x7F, np.nan, size)
    return np.where(bits & 0x80, -size, size)


def ulp(values: np.ndarray, number: int) -> np.ndarray:
    """The spacing of `number` around each value."""
    exponent = np.frexp(np.abs(values))[1] - 1
    return 2.0 ** (np.maximum(exponent, SMALLEST_EXPONENT[number]) - FRACTION_BITS[number])


def aligned_empty(shape: tuple[int, int], number: int, stride: int | None = None, shift: int = 0) -> np.ndarray:
    """A poisoned (all bits set: NaN) matrix whose rows begin `stride` elements apart, `shift` elements after a 128-byte boundary."""
    dtype = np.dtype(STORAGE[number])
    stride = shape[1] if stride is None else stride
    raw = np.full(128 + (shape[0] * stride + shift) * dtype.itemsize, 0xFF, np.uint8)
    start = -raw.ctypes.data % 128 + shift * dtype.itemsize
    flat = raw[start : start + shape[0] * stride * dtype.itemsize].view(dtype)
    return flat.reshape(shape[0], stride)[:, : shape[1]]


@dataclass
class Target:
    """One adapted matrix with its bank: what a segment describes."""

    live: np.ndarray  # [rows, cols] bits
    base: np.ndarray  # [rows, cols] bits
    a: np.ndarray  # [N, r, cols] bits
    b: np.ndarray  # [N, rows, r] bits
    scaling: np.ndarray  # [N] float32
    ranks: np.ndarray | None = None  # [N] int32
    scale: np.ndarray | None = None  # [rows >> row_shift, cols >> col_shift] float32
    shifts: tuple[int, int] = (31, 31)


def make_target(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    *,
    rank: int = 16,
    adapters: int = 4,
    live: int = BF16,
    source: int | None = None,
    factor: int | None = None,
    ranks: Sequence[int] | None = None,
    stride: int | None = None,
    shift: int = 0,
    scales: str = "tensor",
    size: float = 0.07,
) -> Target:
    """Signed random weights of standard deviation 0.02; an adapter's delta is about `size` of that."""
    source = live if source is None else source
    factor = live if factor is None else factor
    padded = -(-rank // 16) * 16
    a = rng.standard_normal((adapters, padded, cols)) / np.sqrt(max(cols, 1))
    b = rng.standard_normal((adapters, rows, padded)) * (size * 0.02 * np.sqrt(max(cols, 1) / rank))
    actual = np.array(ranks if ranks is not None else [rank] * adapters, np.int32)
    for n, r in enumerate(actual):
        a[n, r:] = 0
        b[n, :, r:] = 0
    values = rng.standard_normal((rows, cols)) * 0.02
    scale, shifts = None, (31, 31)
    if source == FP8:
        shifts = {"tensor": (31, 31), "row": (0, 31), "block": (7, 7)}[scales]
        shape = tuple(((n - 1) >> s) + 1 for n, s in zip((rows, cols), shifts, strict=True))
        scale = rng.uniform(0.5, 2.0, shape).astype(np.float32) * np.float32(1e-3)
        values = values / spread(scale, rows, cols, shifts)
    base = aligned_empty((rows, cols), source, stride, shift)
    base[:] = encode(values, source)
    return Target(
        live=aligned_empty((rows, cols), live, stride, shift),
        base=base,
        a=_aligned(encode(a, factor)),
        b=_aligned(encode(b, factor)),
        scaling=rng.uniform(0.5, 2.0, adapters).astype(np.float32),
        ranks=actual,
        scale=scale,
        shifts=shifts,
    )


def _aligned(values: np.ndarray) -> np.ndarray:
    """As GPU allocations are."""
    raw = np.empty(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 128
    copied = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copied[:] = values
    return copied


def spread(scale: np.ndarray, rows: int, cols: int, shifts: tuple[int, int]) -> np.ndarray:
    return scale[np.ix_(np.arange(rows) >> shifts[0], np.arange(cols) >> shifts[1])]


@dataclass
class Launch:
    """A planned table of targets and its device state; every array it points to stays alive with it."""

    lib: ctypes.CDLL
    targets: list[Target]
    live: int = BF16
    source: int | None = None
    factor: int | None = None
    inplace: bool = False
    check_finite: bool = False
    multiprocessors: int = 4
    unit_rows: int = 0
    shared_limit: int = 99 << 10
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.source = self.live if self.source is None or self.inplace else self.source
        self.factor = self.live if self.factor is None else self.factor
        self.table = (Segment * len(self.targets))(*(self._segment(t) for t in self.targets))
        self.adapters = len(self.targets[0].scaling) if self.targets else 1
        self.plan = self._plan(MAX_SLOTS)

    def _segment(self, t: Target) -> Segment:
        source = t.live if self.inplace else t.base
        s = Segment(rows=t.live.shape[0], cols=t.live.shape[1], rank=t.a.shape[1])
        s.live, s.source, s.a, s.b, s.scaling = (x.ctypes.data for x in (t.live, source, t.a, t.b, t.scaling))
        s.ranks = None if t.ranks is None else t.ranks.ctypes.data
        s.live_stride, s.source_stride = (x.strides[0] // x.itemsize for x in (t.live, source))
        s.a_adapter_stride, s.a_row_stride = (n // t.a.itemsize for n in t.a.strides[:2])
        s.b_adapter_stride, s.b_row_stride = (n // t.b.itemsize for n in t.b.strides[:2])
        s.scale_row_shift, s.scale_col_shift = t.shifts
        if t.scale is not None:
            s.source_scale, s.scale_stride = t.scale.ctypes.data, t.scale.shape[1]
        return s

    def _plan(self, slots: int) -> PlanResult:
        device = self.multiprocessors, self.shared_limit, self.unit_rows
        request = PlanRequest(self.live, self.source, self.factor, self.inplace, len(self.targets), self.adapters, slots, *device)
        result = PlanResult()
        if self.lib.fm_sim_plan(ctypes.byref(request), self.table, ctypes.byref(result)):
            raise PlanError(result.error.decode())
        return result

    def switch(self, ids: Sequence[int], gates: Sequence[float], *, grid: int | None = None, how: Options | None = None) -> None:
        id_array, gate_array = np.array(ids, np.int32), np.array(gates, np.float32)
        params = Params(
            segments=ctypes.addressof(self.table),
            state=ctypes.addressof(self.state),
            ids=id_array.ctypes.data,
            gates=gate_array.ctypes.data,
            num_units=self.plan.num_units,
            num_segments=len(self.targets),
            num_slots=len(id_array),
            num_adapters=self.adapters,
            inplace=self.inplace,
            check_finite=self.check_finite,
            resident_chunks=self.plan.resident_chunks,
        )
        where = ctypes.byref(params), grid or self.plan.grid, self.plan.shared_bytes, ctypes.byref(how or options())
        code = self.lib.fm_sim_switch(self.live, self.source, self.factor, *where)
        if code:
            raise SimulatorError(self.lib.fm_sim_error().decode())


def base_values(t: Target, source: int) -> np.ndarray:
    """The float64 values of the base; an fp8 base is the float32 product of scale and stored value."""
    if t.scale is None:
        return decode(t.base, source)
    wide = spread(t.scale, *t.base.shape, t.shifts)
    return (wide * decode(t.base, source).astype(np.float32)).astype(np.float32).astype(np.float64)


def truth(t: Target, source: int, factor: int, ids: Sequence[int], gates: Sequence[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """(sum, S, K): the exact value in float64, the sum of the terms' sizes, and the padded ranks of the mixture."""
    total = base_values(t, source)
    size = np.abs(total)
    depth = 0
    for e in sorted({i for i in ids if i >= 0}):
        gate = np.float32(0)
        for i, g in zip(ids, gates, strict=True):
            if i == e:
                gate = np.float32(gate + np.float32(g))
        c = float(gate) * float(t.scaling[e])
        if c == 0:
            continue
        a, b = decode(t.a[e], factor), decode(t.b[e], factor)
        total = total + c * (b @ a)
        size = size + abs(c) * (np.abs(b) @ np.abs(a))
        depth += t.a.shape[1]
    return total, size, depth


def check(t: Target, launch: Launch, ids: Sequence[int], gates: Sequence[float]) -> float:
    """Asserts the bounds of the contract; returns the share of correctly rounded weights."""
    assert launch.source is not None and launch.factor is not None
    exact, size, depth = truth(t, launch.source, launch.factor, ids, gates)
    got = decode(t.live, launch.live)
    simt = launch.factor == FLOAT32
    slack = max(2.0**-20 if simt else 2.0**-18, depth * (2.0**-26 if simt else 2.0**-27)) * size
    bound = 0.5 * ulp(np.maximum(np.abs(exact), np.abs(got)), launch.live) + slack
    worst = np.abs(got - exact) - bound
    assert not (np.isnan(got).any()), "not every weight was written"
    assert (worst <= 0).all(), f"error beyond the bound at {np.unravel_index(worst.argmax(), worst.shape)}: {got.flat[worst.argmax()]}"
    return float((t.live == encode(exact, launch.live)).mean()) if t.live.size else 1.0
