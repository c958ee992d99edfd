"""The compiled CPU merge against float64: every variant this machine runs, dtypes, shapes, ranks, strides, threads and special values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

_ext = pytest.importorskip("fusedmerge._ext", reason="the extension is not built here; tests/test_packaging.py says if it should be")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MANTISSA = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
MIN_EXPONENT = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = [(1, 1), (1, 4096), (67, 131), (257, 130), (193, 513)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ISAS = [isa for isa in _ext.isas() if isa != "avx512bf16"]  # whose merge is avx512's


@dataclass
class Expert:
    a: torch.Tensor  # [r, cols]
    b: torch.Tensor  # [rows, r]
    coefficient: float


@dataclass
class Segment:
    live: torch.Tensor  # [rows, cols]
    source: torch.Tensor  # [rows, cols]
    experts: Sequence[Expert] = ()


def merge(segments: Sequence[Segment], threads: int = 2, isa: str = "") -> None:
    table, experts, coefficients = [], [], []
    for s in segments:
        for e in s.experts:
            experts.append((e.a.data_ptr(), e.b.data_ptr(), e.a.stride(0), e.b.stride(0), e.a.shape[0], CODES[e.a.dtype]))
            coefficients.append(e.coefficient)
        code = CODES[s.live.dtype]
        table.append((s.live.data_ptr(), s.source.data_ptr(), *s.live.shape, s.live.stride(0), s.source.stride(0), code, len(experts)))
    _ext.merge_cpu(
        np.array(table, dtype=np.int64).reshape(-1, 8),
        np.array(experts, dtype=np.int64).reshape(-1, 6),
        np.array(coefficients, dtype=np.float64),
        threads,
        isa=isa,
    )


def make(
    rows: int,
    cols: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    factor: torch.dtype | None = None,
    seed: int = 0,
) -> Segment:
    """A segment with signed random data, |delta| / |W| about 0.07 per expert, and a poisoned output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    source = normal(rows, cols, std=0.02).to(dtype)
    coefficients = [0.7, -0.3, 1.9, -1.0, 0.01]
    experts = [
        Expert(
            normal(r, cols, std=0.05).to(factor or dtype),
            normal(rows, r, std=0.028 / max(r, 1) ** 0.5).to(factor or dtype),
            coefficients[i % len(coefficients)],
        )
        for i, r in enumerate(ranks)
    ]
    return Segment(torch.full_like(source, torch.nan), source, experts)


def truth(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """The exact result and S = |base| + sum |c| |B| |A|, in float64."""
    exact = segment.source.double()
    scale = exact.abs()
    for e in segment.experts:
        exact = exact + e.coefficient * (e.b.double() @ e.a.double())
        scale = scale + abs(e.coefficient) * (e.b.double().abs() @ e.a.double().abs())
    return exact.numpy(), scale.numpy()


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    exponent = np.maximum(np.frexp(x)[1] - 1, MIN_EXPONENT[dtype])
    return np.ldexp(1.0, exponent - MANTISSA[dtype])


def check_accuracy(segment: Segment, truth_of: Segment | None = None) -> float:
    """Asserts the error bound of every element; returns the share that is correctly rounded."""
    exact, scale = truth(truth_of or segment)
    dtype = segment.live.dtype
    got = segment.live.double().numpy()
    depth = sum(e.a.shape[0] for e in segment.experts)
    relative = max(2.0**-20, depth * 2.0**-26) if dtype == torch.float32 else max(2.0**-18, depth * 2.0**-27)
    spacing = ulp(exact, dtype)
    error = np.abs(got - exact)
    worst = np.max(error - 0.5 * spacing - relative * scale)
    assert worst <= 0, f"an element misses its bound by {worst}"
    return float(np.mean(got == np.rint(exact / spacing) * spacing))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


def assert_same_bits(x: torch.Tensor, y: torch.Tensor) -> None:
    assert torch.equal(bits(x), bits(y))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_isa_is_the_best_of_isas() -> None:
    assert _ext.isas()[0] == "portable"
    assert _ext.isa() == _ext.isas()[-1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    segments = [make(*shape, ranks, dtype, seed=i) for i, ranks in enumerate([(1,), (16,), (64, 8), (3, 33, 17), (0, 5)])]
    segments += [make(*shape, (7, 12), dtype, factor, seed=9) for factor in DTYPES]
    merge(segments, isa=isa)
    for segment in segments:
        check_accuracy(segment)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype, least", [(torch.bfloat16, 0.999), (torch.float16, 0.995)])
def test_share_correctly_rounded(dtype: torch.dtype, least: float, isa: str) -> None:
    segment = make(600, 900, (64, 64), dtype)
    merge([segment], isa=isa)
    assert check_accuracy(segment) >= least


@pytest.mark.parametrize("isa", ISAS)
def test_deep_mixture(isa: str) -> None:
    segment = make(70, 90, [128] * 8, torch.bfloat16)
    merge([segment], isa=isa)
    check_accuracy(segment)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_all_threads_orders_and_cuts(dtype: torch.dtype, isa: str) -> None:
    segment = make(420, 1100, (16, 40), dtype)
    merge([segment], threads=1, isa=isa)
    expected = segment.live.clone()
    for threads in (1, 2, 3, 64):
        segment.live.fill_(torch.nan)
        merge([segment], threads=threads, isa=isa)
        assert_same_bits(segment.live, expected)

    segment.live.fill_(torch.nan)
    merge([Segment(segment.live, segment.source, segment.experts[::-1])], isa=isa)
    assert_same_bits(segment.live, expected)

    segment.live.fill_(torch.nan)
    row_cuts, col_cuts = (0, 1, 38, 231, 420), (0, 3, 515, 1030, 1100)
    pieces = []
    for row, row_end in pairwise(row_cuts):
        for col, col_end in pairwise(col_cuts):
            rows, cols = slice(row, row_end), slice(col, col_end)
            experts = [Expert(e.a[:, cols], e.b[rows], e.coefficient) for e in segment.experts]
            pieces.append(Segment(segment.live[rows, cols], segment.source[rows, cols], experts))
    merge(pieces, threads=2, isa=isa)
    assert_same_bits(segment.live, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_in_place(dtype: torch.dtype, isa: str) -> None:
    dense = make(67, 131, (5, 34), dtype)
    merge([dense], isa=isa)

    wide_live, wide_source = (torch.full((67, 200), torch.inf, dtype=dtype) for _ in range(2))
    live, source = wide_live[:, 7:138], wide_source[:, 60:191]
    source.copy_(dense.source)
    experts = []
    for e in dense.experts:
        a, b = torch.full((e.a.shape[0], 150), torch.inf, dtype=dtype), torch.full((67, 50), torch.inf, dtype=dtype)
        a[:, 3:134], b[:, 9 : 9 + e.b.shape[1]] = e.a, e.b
        experts.append(Expert(a[:, 3:134], b[:, 9 : 9 + e.b.shape[1]], e.coefficient))
    merge([Segment(live, source, experts)], isa=isa)
    assert_same_bits(live, dense.live)
    assert torch.isinf(wide_live[:, :7]).all() and torch.isinf(wide_live[:, 138:]).all()

    in_place = dense.source.clone()
    merge([Segment(in_place, in_place, dense.experts)], isa=isa)
    assert_same_bits(in_place, dense.live)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_expert_copies_bits(dtype: torch.dtype, isa: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    patterns = patterns.to(torch.int16) if dtype != torch.float32 else patterns * 65537
    source = patterns.view(dtype).view(256, 256)
    unused = make(256, 256, (4, 0), dtype).experts
    unused[0].coefficient = 0.0
    unused[0].a.fill_(torch.nan)
    for experts in ((), unused):
        live = torch.zeros_like(source)
        merge([Segment(live, source, experts)], isa=isa)
        assert_same_bits(live, source)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_torch(dtype: torch.dtype, isa: str) -> None:
    """Every upper half of a float32, with lower halves at and around all ties of both formats: 0 + 1 * x, rounded."""
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = torch.from_numpy((high | low).ravel().view(np.float32))[None]
    one = torch.ones(1, 1)
    live = torch.full(values.shape, torch.nan, dtype=dtype)
    with flushed_denormals():  # the process's modes must not matter
        merge([Segment(live, torch.zeros_like(live), [Expert(values, one, 1.0)])], isa=isa)
    expected = (values + 0.0).to(dtype)  # 0 + -0 is 0
    nan = torch.isnan(values)
    assert torch.equal(torch.isnan(live), nan)
    assert_same_bits(live[~nan], expected[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens(factor: torch.dtype, isa: str) -> None:
    """As a factor (0 + 1 * x) and as a weight (x + 1 * 0), every bit pattern comes back."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(factor)[None]
    nan = torch.isnan(values)
    one, zero = torch.ones(1, 1, dtype=factor), torch.zeros_like(values)
    as_factor, as_weight = torch.empty_like(values, dtype=torch.float32), torch.empty_like(values)
    merge(
        [Segment(as_factor, zero.float(), [Expert(values, one, 1.0)]), Segment(as_weight, values, [Expert(zero, one, 1.0)])],
        isa=isa,
    )
    for got in (as_factor, as_weight.float()):
        assert torch.equal(torch.isnan(got), nan)
        assert torch.equal(got[~nan], values[~nan].float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exponents", [(-70, 70), (70, -70), (-60, -60), (-100, 120), (-130, 126)])
def test_factors_of_extreme_size(exponents: tuple[int, int], isa: str) -> None:
    """Values that AMX tiles would flush to zero or overflow on keep float32's range."""
    segment = make(40, 50, (8,), torch.bfloat16)
    expert = segment.experts[0]
    for factor, exponent in zip((expert.a, expert.b), exponents, strict=True):
        factor.copy_(torch.ldexp(factor.double(), torch.tensor(float(exponent))).to(torch.bfloat16))
    segment.source.mul_(2.0 ** max(sum(exponents), -100))
    merge([segment], isa=isa)
    check_accuracy(segment)


@pytest.mark.parametrize("isa", ISAS)
def test_infinity_and_nan_stay_where_they_belong(isa: str) -> None:
    segment = make(40, 50, (8, 4), torch.bfloat16)
    merge([segment], isa=isa)
    clean = segment.live.clone()
    segment.source[3, 5], segment.source[4, 6] = torch.inf, torch.nan
    segment.experts[0].b[9, 2] = torch.inf
    segment.experts[1].a[1, 11] = torch.nan
    merge([segment], isa=isa)
    assert segment.live[3, 5] == torch.inf
    assert torch.isnan(segment.live[4, 6])
    assert not torch.isfinite(segment.live[9]).any()
    assert torch.isnan(segment.live[:, 11]).all()
    segment.live[9], segment.live[:, 11] = clean[9], clean[:, 11]
    segment.live[3, 5], segment.live[4, 6] = clean[3, 5], clean[4, 6]
    torch.testing.assert_close(segment.live, clean, rtol=2**-7, atol=0)  # the variant may differ: one ulp


def test_one_call_merges_many_segments() -> None:
    segments = [make(3 + 11 * i, 5 + 70 * i, (4, 9)[: i % 3], DTYPES[i % 3], seed=i) for i in range(12)]
    merge(segments, threads=3)
    for segment in segments:
        check_accuracy(segment)


def test_concurrent_calls() -> None:
    segments = [make(300, 300, (16,), torch.bfloat16, seed=i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda s: merge([s]), segments))
    for segment in segments:
        check_accuracy(segment)


def test_empty_tables_and_shapes() -> None:
    merge([])
    empty = torch.empty(0, 5)
    merge([Segment(empty, empty), Segment(torch.empty(5, 0), torch.empty(5, 0))])


@pytest.mark.parametrize(
    "field, change",
    [
        ("dtype", lambda s, e: s.__setitem__((0, 6), 3)),
        ("live_stride", lambda s, e: s.__setitem__((0, 4), 5)),
        ("source_stride", lambda s, e: s.__setitem__((0, 5), 5)),
        ("rows", lambda s, e: s.__setitem__((0, 2), -1)),
        ("experts_end", lambda s, e: s.__setitem__((0, 7), 2)),
        ("rank", lambda s, e: e.__setitem__((0, 4), -1)),
        ("a_stride", lambda s, e: e.__setitem__((0, 2), 5)),
        ("b_stride", lambda s, e: e.__setitem__((0, 3), 1)),
    ],
)
def test_refuses_tables_that_cannot_be_right(field: str, change: object) -> None:
    x = make(4, 6, (2,), torch.float32)
    e = x.experts[0]
    segments = np.array([[x.live.data_ptr(), x.source.data_ptr(), 4, 6, 6, 6, 0, 1]])
    experts = np.array([[e.a.data_ptr(), e.b.data_ptr(), 6, 2, 2, 0]])
    change(segments, experts)  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"merge_cpu: .*{field}: expected .*, got"):
        _ext.merge_cpu(segments, experts, np.ones(1), 1)
    assert torch.isnan(x.live).all()


def test_refuses_arguments() -> None:
    segments, experts, coefficients = np.empty((0, 8), np.int64), np.empty((0, 6), np.int64), np.empty(0)
    for arguments, isa in [
        ((segments[:, :7].copy(), experts, coefficients, 1), ""),
        ((segments, experts[:, :5].copy(), coefficients, 1), ""),
        ((segments, experts, np.ones(1), 1), ""),
        ((segments, experts, coefficients, 0), ""),
        ((segments, experts, coefficients, 1), "mmx"),
    ]:
        with pytest.raises(ValueError, match="expected"):
            _ext.merge_cpu(*arguments, isa=isa)
    with pytest.raises(TypeError):
        _ext.merge_cpu(segments.astype(np.int32), experts, coefficients, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_in_a_forked_child() -> None:
    """No thread pool outlives a call, so a child (a data loader's, say) can merge too."""
    segment = make(300, 600, (8,), torch.bfloat16)
    merge([segment])
    live = bits(segment.live).numpy()  # the same memory
    expected = live.copy()
    live[:] = 0
    child = os.fork()
    if child == 0:
        merge([segment])
        os._exit(0 if np.array_equal(live, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
