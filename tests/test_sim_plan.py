"""The planner in the simulator's library, and the simulator itself: its arithmetic, and the faults that it notices."""

from __future__ import annotations

import ctypes

import harness
import numpy as np
import pytest
from harness import BF16, FLOAT32, FP8, FP16, Launch, check, decode, make_target, options, truth

CORRECT_SHARE = {BF16: 0.999, FP16: 0.995}
NAMES = {BF16: "bf16", FP16: "fp16", FLOAT32: "float32", FP8: "fp8"}


def plan(lib, shapes, **changes):
    segments = (harness.Segment * len(shapes))()
    for s, (rows, cols) in zip(segments, shapes, strict=True):
        s.rows, s.cols, s.rank = rows, cols, 64
        s.live = s.source = s.a = s.b = s.scaling = 4096
        s.source = 8192
        s.live_stride = s.source_stride = s.a_row_stride = cols
        s.b_row_stride, s.a_adapter_stride, s.b_adapter_stride = 64, 64 * cols, 64 * rows
        s.scale_row_shift = s.scale_col_shift = 31
        for name in set(changes) & {name for name, _ in harness.Segment._fields_}:
            setattr(s, name, changes[name])
    fields = {"live": BF16, "source": BF16, "factor": BF16, "num_segments": len(shapes), "num_adapters": 8, "num_slots": 2}
    fields |= {"num_multiprocessors": 132, "shared_bytes_limit": 99 << 10}
    request = harness.PlanRequest(**(fields | {k: v for k, v in changes.items() if k in dict(harness.PlanRequest._fields_)}))
    result = harness.PlanResult()
    lib.fm_sim_plan(ctypes.byref(request), segments, ctypes.byref(result))
    return segments, result


LLAMA_LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def test_plan_of_llama_2_7b(lib):
    segments, result = plan(lib, LLAMA_LAYER * 32)
    assert result.error == b""
    assert result.live_bytes == result.source_bytes == 2 * 6_476_005_376
    assert result.adapter_bytes * 2 == 639_631_360  # two adapters of rank 64: 0.64 GB
    assert result.grid == 132
    ends = [*(s.first_unit for s in segments[1:]), result.num_units]
    for s, end in zip(segments, ends, strict=True):
        panels = -(-s.rows // s.unit_rows)
        assert s.unit_rows % 64 == 0 and (end - s.first_unit) == panels * -(-s.cols // 256)
    work = sum(-(-s.rows // s.unit_rows) * -(-s.cols // 256) * s.unit_rows for s in segments)
    longest = max(s.unit_rows for s in segments)
    assert longest / (work / 132) < 0.02  # the last wave's tail


def test_plan_of_one_small_matrix_fills_the_device(lib):
    _, result = plan(lib, [(4096, 4096)])
    assert result.num_units >= 132


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"live": FP8}, "live dtype"),
        ({"source": FP16}, "base dtype"),
        ({"factor": FP16}, "factor dtype"),
        ({"inplace": 1, "source": FP8}, "base dtype"),
        ({"inplace": 1}, "expected source to be live"),
        ({"num_slots": 33}, "slots: expected 0 to 32, got 33"),
        ({"num_adapters": 0}, "adapters"),
        ({"shared_bytes_limit": 48 << 10}, "shared memory"),
        ({"unit_rows": 100}, "unit rows"),
        ({"rows": -1}, "segment 0: expected a shape"),
        ({"rank": 8}, "segment 0: expected a rank padded to a multiple of 16, got 8"),
        ({"a": 0}, "null pointer"),
        ({"live_stride": 10}, "live stride of at least 40, got 10"),
        ({"source_stride": 39}, "source stride"),
        ({"a_row_stride": 8}, "a row stride"),
        ({"b_row_stride": 8}, "b row stride"),
        ({"scale_col_shift": 2}, "scale shifts"),
    ],
)
def test_plans_that_are_refused(lib, changes, words):
    _, result = plan(lib, [(30, 40)], **changes)
    assert words in result.error.decode()
    assert result.error.decode().startswith("switch: ")


# ---- the simulator's own arithmetic ----------------------------------------------------------------------------------


def test_conversions_match_numpy(lib, rng):
    special = [0.0, -0.0, 65519.9, 65520.0, 2.0**-25, 6e-8, np.inf]
    values = np.concatenate([rng.standard_normal(300) * 10.0 ** rng.uniform(-9, 5, 300), special])
    for x in values.astype(np.float32):
        with np.errstate(over="ignore"):
            assert np.float32(lib.fm_sim_fp16(x)).tobytes() == np.float32(np.float16(x)).tobytes()
        assert lib.fm_sim_bf16(x) == harness.encode(np.array([x]), BF16)[0]
    table = decode(np.arange(256, dtype=np.uint8), FP8)
    ours = np.array([lib.fm_sim_fp8(i) for i in range(256)])
    assert np.array_equal(ours, table, equal_nan=True)


@pytest.mark.parametrize("extra", [1, 2])
def test_tensor_core_twin_truncates(lib, rng, extra):
    def dot(c, a, b):
        a, b = np.array(a, np.float32), np.array(b, np.float32)
        return lib.fm_sim_dot(c, a.ctypes.data, b.ctypes.data, len(a), extra)

    assert dot(1.0, [2.0**-24] * 8, [1.0] * 8) == (1.0 + 4 * 2.0**-23 if extra >= 1 else 1.0)
    lost = [2.0 ** -(24 + extra)] * 8  # each below the last kept bit: all vanish, where rounding would keep their sum
    assert dot(1.0, lost, [1.0] * 8) == 1.0
    assert dot(-1.0, lost, [1.0] * 8) == -1.0
    for _ in range(200):
        a = harness.decode(harness.encode(rng.standard_normal(16), BF16), BF16)
        b = harness.decode(harness.encode(rng.standard_normal(16), BF16), BF16)
        c = float(np.float32(rng.standard_normal()))
        largest = max(abs(c), *np.abs(a * b))
        assert abs(dot(c, a, b) - (c + a @ b)) <= 17 * largest * 2.0 ** -(22 + extra) + 8 * largest * 2.0**-23


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (0, "deadlock"),
        (1, "deadlock"),
        (2, "32 in a warp-wide instruction (ldmatrix)"),
        (3, "never waited for"),
        (4, "misaligned"),
        (5, "divergent warp"),
    ],
)
def test_the_simulator_notices_faults(lib, fault, words, order):
    assert words in lib.fm_sim_fault(fault, ctypes.byref(options(order))).decode()


def test_truth_notices_an_error(lib, rng):
    """The comparison itself can fail: one weight off by one bit is found."""
    target = make_target(rng, 20, 20)
    launch = Launch(lib, [target])
    launch.switch([0], [1.0])
    target.live[3, 3] ^= 1
    with pytest.raises(AssertionError, match="beyond the bound"):
        check(target, launch, [0], [1.0])
    assert truth(target, BF16, BF16, [0], [1.0])[2] == 16
