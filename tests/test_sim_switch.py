"""The switch kernel's own sources on the host simulator, against float64: values, bits, selection protocol, refusals."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from harness import BAD_GATE, BAD_ID, BF16, FLOAT32, FP8, FP16, NON_FINITE, Launch, check, decode, make_target, options

from tests import kit
from tests.conftest import ON_HOST, use_host

CORRECT_SHARE = {BF16: 0.999, FP16: 0.995}
NAMES = {BF16: "bf16", FP16: "fp16", FLOAT32: "float32", FP8: "fp8"}


@pytest.fixture(params=ON_HOST)
def lib(request, monkeypatch, lib):
    use_host(request.param, request, monkeypatch)
    return lib


def bits(targets) -> list[bytes]:
    return [t.live.tobytes() for t in targets]


def poison(targets) -> None:
    for t in targets:
        t.live[:] = np.nan if t.live.dtype == np.float32 else 0xFFFF


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [BF16, FP16, FLOAT32], ids=NAMES.get)
@pytest.mark.parametrize(
    ("rows", "cols", "rank"),
    [(1, 1, 4), (1, 4096, 16), (4096, 1, 3), (67, 131, 40), (130, 257, 64), (64, 256, 128), (65, 300, 7), (200, 40, 300), (66, 24, 512)],
)
def test_shapes(lib, rng, rows, cols, rank, live):
    target = make_target(rng, rows, cols, rank=rank, live=live)
    launch = Launch(lib, [target], live=live)
    ids, gates = [2, 0], [0.7, 0.3]
    launch.switch(ids, gates)
    share = check(target, launch, ids, gates)
    if target.live.size > 4000 and live != FLOAT32:
        assert share >= CORRECT_SHARE[live]


@pytest.mark.parametrize("tensor_core", [0, 1], ids=["a100", "h100"])
@pytest.mark.parametrize("live", [BF16, FP16], ids=NAMES.get)
def test_deep_mixture_is_correctly_rounded(lib, rng, live, tensor_core):
    target = make_target(rng, 70, 264, rank=128, live=live, adapters=8)
    launch = Launch(lib, [target], live=live)
    ids, gates = list(range(8)), [0.35, -0.2, 0.3, 0.25, 0.4, -0.31, 0.22, 0.27]
    launch.switch(ids, gates, how=options(tensor_core=tensor_core))
    assert check(target, launch, ids, gates) >= CORRECT_SHARE[live]


@pytest.mark.parametrize("order", kit.fast_first([2, 0, 1]))
def test_two_resident_chunks_have_the_bits_of_one(lib, rng, order):
    """In place at r = 64, top-2, on a device with 227 KB: the strips of 256 ranks stay in shared memory. Other depths share the launch."""
    shapes = [(450, 300, 64), (70, 40, 80), (5, 9, 16), (130, 260, 48)]
    images = []
    for limit in (99 << 10, 227 << 10):
        local = np.random.default_rng(7)
        targets = [make_target(local, rows, cols, rank=rank) for rows, cols, rank in shapes]
        launch = Launch(lib, targets, shared_limit=limit)
        assert launch.plan.resident_chunks == (1 if limit < 200 << 10 else 2)
        ids, gates = [0, 1, 2, 3], [-0.7, -0.3, 0.4, 0.6]
        launch.switch(ids, gates, how=options(order, async_copies=order))
        for target in targets:
            check(target, launch, ids, gates)
        images.append(bits(targets))
    assert images[0] == images[1]


@pytest.mark.parametrize("live", [BF16, FP16], ids=NAMES.get)
def test_float32_factors(lib, rng, live):
    target = make_target(rng, 66, 270, rank=20, live=live, factor=FLOAT32)
    launch = Launch(lib, [target], live=live, factor=FLOAT32)
    launch.switch([1, 3], [0.4, -0.8])
    assert check(target, launch, [1, 3], [0.4, -0.8]) >= 0.999


@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
@pytest.mark.parametrize(("live", "factor"), [(BF16, BF16), (FP16, FP16), (BF16, FLOAT32), (FLOAT32, FLOAT32)])
def test_fp8_base(lib, rng, live, factor, scales):
    target = make_target(rng, 140, 300, live=live, source=FP8, factor=factor, scales=scales)
    launch = Launch(lib, [target], live=live, source=FP8, factor=factor)
    launch.switch([0, 1], [0.5, 0.25])
    check(target, launch, [0, 1], [0.5, 0.25])
    launch.switch([], [])
    assert np.array_equal(target.live, harness.encode(harness.base_values(target, FP8), live))


@pytest.mark.parametrize(("live", "source"), [(BF16, FLOAT32), (FP16, FLOAT32), (FLOAT32, BF16), (FLOAT32, FP16)])
def test_base_of_another_dtype(lib, rng, live, source):
    target = make_target(rng, 70, 264, live=live, source=source, factor=live)
    launch = Launch(lib, [target], live=live, source=source)
    launch.switch([0, 1], [0.5, 0.25])
    check(target, launch, [0, 1], [0.5, 0.25])
    launch.switch([], [])
    assert np.array_equal(target.live, harness.encode(decode(target.base, source), live))


@pytest.mark.parametrize(("stride", "shift"), [(777, 0), (776, 0), (776, 3), (262, 2)])
@pytest.mark.parametrize("live", [BF16, FLOAT32], ids=NAMES.get)
def test_rows_strided_inside_a_packed_matrix(lib, rng, live, stride, shift):
    target = make_target(rng, 70, 259, live=live, stride=stride, shift=shift)
    launch = Launch(lib, [target], live=live)
    outside = target.live.base.copy() if target.live.base is not None else None
    launch.switch([0, 1], [0.5, 0.25])
    check(target, launch, [0, 1], [0.5, 0.25])
    if outside is not None and stride > 259:  # the other matrices of the pack are untouched
        whole = np.lib.stride_tricks.as_strided(target.live, (69, stride), target.live.strides)
        assert (whole[:, 259:].view(np.uint32 if live == FLOAT32 else np.uint16) == (0xFFFFFFFF if live == FLOAT32 else 0xFFFF)).all()


def test_segments_of_very_different_size(lib, rng):
    shapes = [(1, 1), (300, 520), (1024, 256), (3, 4000), (0, 16), (64, 7), (129, 128)]
    targets = [make_target(rng, rows, cols, rank=rank) for (rows, cols), rank in zip(shapes, [4, 16, 20, 33, 8, 16, 130], strict=True)]
    launch = Launch(lib, targets, multiprocessors=5)
    launch.switch([3, 1], [0.9, -0.4], how=options(resident_blocks=3))
    for target in targets:
        check(target, launch, [3, 1], [0.9, -0.4])


def test_wide_and_tall_columns_of_llama_shapes(lib, rng):
    targets = [make_target(rng, 4097, 255, rank=8), make_target(rng, 1024, 512, rank=8)]
    targets.append(make_target(rng, 4096, 256, rank=8, stride=11008))  # one strip of 4096 x 11008
    launch = Launch(lib, targets, multiprocessors=3)
    launch.switch([1], [1.0])
    for target in targets:
        assert check(target, launch, [1], [1.0]) >= CORRECT_SHARE[BF16]


@pytest.mark.slow
def test_a_large_matrix_with_odd_sides(lib, rng):
    target = make_target(rng, 4097, 4095, rank=4)
    launch = Launch(lib, [target])
    launch.switch([2], [0.7])
    assert check(target, launch, [2], [0.7]) >= CORRECT_SHARE[BF16]


def test_ranks_differ_by_adapter_and_target(lib, rng):
    targets = [make_target(rng, 65, 40, rank=48, ranks=[48, 0, 17, 5]), make_target(rng, 30, 70, rank=16, ranks=[0, 16, 0, 9])]
    for t in targets:  # beyond an adapter's rank nothing may be read
        for n, r in enumerate(t.ranks):
            t.a[n, -(-r // 16) * 16 :] = 0x7FC0
    launch = Launch(lib, targets)
    ids, gates = [0, 1, 2, 3], [0.5, 0.6, -0.7, 0.8]
    launch.switch(ids, gates)
    for t in targets:
        t.a[t.a == 0x7FC0] = 0
        check(t, launch, ids, gates)


def test_many_adapters_and_full_selection(lib, rng):
    target = make_target(rng, 40, 72, rank=4, adapters=4096)
    launch = Launch(lib, [target])
    ids = [int(i) for i in rng.permutation(4096)[:31]] + [4095]
    gates = [float(g) for g in rng.uniform(-0.3, 0.3, 32)]
    launch.switch(ids, gates)
    check(target, launch, ids, gates)


def test_duplicates_add_and_empty_slots_do_not_count(lib, rng):
    target = make_target(rng, 64, 64)
    launch = Launch(lib, [target])
    ids, gates = [2, -1, 0, 2, 1, 1], [0.25, 5.0, 0.5, 0.125, 1.5, -1.5]
    launch.switch(ids, gates)
    check(target, launch, ids, gates)
    seen = bits([target])
    assert (launch.state.num_last, list(launch.state.last_ids[:2]), list(launch.state.last_gates[:2])) == (2, [0, 2], [0.5, 0.375])
    launch.state.valid = 0
    launch.switch([0, 2], [0.5, 0.375])
    assert bits([target]) == seen


@pytest.mark.parametrize(("ids", "gates"), [([], []), ([-1, -1], [1.0, 2.0]), ([1, 1], [0.5, -0.5]), ([0], [0.0])])
def test_an_empty_mixture_copies_bits(lib, rng, ids, gates):
    target = make_target(rng, 50, 300)
    target.base[0, :4] = [0x8000, 0x7F80, 0x7FA1, 0x0001]  # -0.0, infinity, a signalling NaN, a subnormal
    Launch(lib, [target]).switch(ids, gates)
    assert np.array_equal(target.live, target.base)


def test_gates_of_extreme_size(lib, rng):
    target = make_target(rng, 64, 64)
    launch = Launch(lib, [target])
    launch.switch([0, 1, 2], [1e-42, 1e-30, 1.0])
    check(target, launch, [0, 1, 2], [1e-42, 1e-30, 1.0])


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("live", "factor"), [(BF16, BF16), (FP16, FLOAT32)])
def test_same_bits_whatever_runs_it(lib, rng, live, factor):
    targets = [make_target(rng, 200, 260, rank=24, live=live, factor=factor), make_target(rng, 100, 30, rank=16, live=live, factor=factor)]
    seen = set()
    for order in range(3):
        for grid, unit_rows, copies in ((1, 0, 0), (2, 64, 1), (5, 128, 2)):
            poison(targets)
            launch = Launch(lib, targets, live=live, factor=factor, unit_rows=unit_rows)
            launch.switch([0, 3], [0.7, 0.3], grid=grid, how=options(order, async_copies=copies, resident_blocks=2 + order, seed=grid))
            seen.add(tuple(bits(targets)))
    assert len(seen) == 1


def test_scalar_rows_have_the_bits_of_vector_rows(lib):
    images = []
    for stride, shift in ((264, 0), (265, 1)):
        target = make_target(np.random.default_rng(5), 70, 264, stride=stride, shift=shift)
        if shift:  # the same for A's rows
            wide = np.zeros((*target.a.shape[:2], 265), np.uint16)
            wide[..., :264] = target.a
            target.a = wide[..., :264]
        launch = Launch(lib, [target])
        assert bool(launch.table[0].flags & 1) == (shift == 0)
        launch.switch([0, 1], [0.5, 0.25])
        images.append(target.live.tobytes())
    assert images[0] == images[1]


@pytest.mark.slow
def test_a_thousand_switches_then_restore(lib, rng):
    targets = [make_target(rng, 5, 24), make_target(rng, 3, 9, rank=4)]
    launch = Launch(lib, targets)
    for i in range(1000):
        launch.switch([i % 4, (i + 1) % 4], [0.5 + i * 1e-3, 0.5], how=options(i % 3, seed=i))
    for target in targets:
        check(target, launch, [999 % 4, 1000 % 4], [0.5 + 999e-3, 0.5])
    launch.switch([], [])
    assert all(np.array_equal(t.live, t.base) for t in targets)


# ---- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [BF16, FLOAT32], ids=NAMES.get)
def test_inplace_moves_by_the_difference(lib, rng, live):
    target = make_target(rng, 70, 264, live=live)
    target.live[:] = target.base
    launch = Launch(lib, [target], live=live, inplace=True)
    old, new = ([0, 1], [0.5, 0.25]), ([1, 2], [0.25, -0.75])
    launch.switch(*old)
    check(target, launch, *old)
    target.base[:] = target.live
    launch.switch(*new)
    check(target, launch, [0, 2], [-0.5, -0.75])  # adapter 1 did not change: it is not touched
    assert list(launch.state.last_ids[:2]) == [1, 2]
    before = bits([target])
    launch.state.valid = 0
    launch.switch(*new)
    assert bits([target]) == before


def test_inplace_drift_is_one_rounding_a_switch(lib, rng):
    target = make_target(rng, 16, 64, size=0.5)
    target.live[:] = target.base
    launch = Launch(lib, [target], inplace=True)
    for i in range(50):
        launch.switch([i % 4], [1.0])
    launch.switch([], [])
    start, end = decode(target.base, BF16), decode(target.live, BF16)
    drift = np.linalg.norm(end - start) / np.linalg.norm(start)
    assert 1e-3 < drift < 50 * 2.0**-8


# ---- the selection's protocol ----------------------------------------------------------------------------------------


def test_an_unchanged_selection_writes_nothing(lib, rng):
    target = make_target(rng, 65, 40)
    launch = Launch(lib, [target])
    launch.switch([2, 0], [0.5, 0.25])
    poison([target])
    image = bits([target])
    launch.switch([0, -1, 2], [0.25, 0.0, 0.5])  # the same mixture, written differently
    assert bits([target]) == image
    launch.state.valid = 0
    launch.switch([0, 2], [0.25, 0.5])
    check(target, launch, [0, 2], [0.25, 0.5])
    assert launch.state.valid == 1


@pytest.mark.parametrize(
    ("ids", "gates", "status"),
    [
        ([4], [1.0], BAD_ID),
        ([0, -2], [1.0, 1.0], BAD_ID),
        ([0, 2**31 - 1], [1.0, 1.0], BAD_ID),
        ([0, 1], [1.0, np.nan], BAD_GATE),
        ([0, 1], [-np.inf, 1.0], BAD_GATE),
        ([1, 1], [3e38, 3e38], BAD_GATE),
        ([1, -1], [1.0, np.nan], BAD_GATE),  # in an empty slot too
        ([9, 1], [1.0, np.nan], BAD_ID | BAD_GATE),
    ],
)
@pytest.mark.parametrize("inplace", [False, True], ids=["exact", "inplace"])
def test_invalid_selections_change_nothing(lib, rng, ids, gates, status, inplace):
    target = make_target(rng, 70, 300)
    target.live[:] = target.base
    launch = Launch(lib, [target], inplace=inplace)
    launch.switch([0, 1], [0.5, 0.5])
    image, state = bits([target]), bytes(launch.state)
    launch.switch(ids, gates, how=options(resident_blocks=3))
    assert launch.state.status == status
    launch.state.status = 0
    assert bits([target]) == image
    assert bytes(launch.state) == state


@pytest.mark.parametrize("inplace", [False, True], ids=["exact", "inplace"])
def test_protocol_under_interleaved_blocks(lib, rng, inplace):
    """A block that starts late must still see the last selection, however many blocks have finished before it."""
    targets = [make_target(rng, 192, 40), make_target(rng, 1, 600)]
    mixtures = [([0, 1], [0.5, 0.5]), ([1, 2], [0.5, 0.25]), ([], []), ([3], [1.0])]
    images = []
    for blocks, seed in ((1, 0), (2, 1), (3, 2), (8, 3)):
        for t in targets:
            t.live[:] = t.base
        launch = Launch(lib, targets, inplace=inplace, unit_rows=64)
        image = []
        for mixture in mixtures:
            launch.switch(*mixture, grid=7, how=options(2, resident_blocks=blocks, seed=seed))
            assert (launch.state.ticket, launch.state.num_last) == (0, len(mixture[0]))
            image += bits(targets)
        images.append(image)
    assert all(image == images[0] for image in images)


def test_finite_flag(lib, rng):
    target = make_target(rng, 70, 30, live=FP16)
    launch = Launch(lib, [target], live=FP16, check_finite=True)
    launch.switch([0], [1.0])
    assert launch.state.status == 0
    target.base[69, 29] = 0x7BFF  # 65504: any larger and it is infinity
    target.a[1, :, 29] = target.b[1, 69, :] = 0x4900  # 10.0
    launch.switch([1], [10.0])
    assert launch.state.status == NON_FINITE
    launch.state.status = 0
    launch.check_finite = False
    launch.switch([1], [11.0])
    assert launch.state.status == 0


# ---- addresses ---------------------------------------------------------------------------------------------


def test_offsets_past_2_to_the_31_elements(lib, rng):
    """Huge strides over address space that is reserved, not used: only the touched pages exist."""
    import mmap

    rows, cols, adapters = 3, 40, 3
    row_stride, adapter_stride = 2**31 + 64, 5 * 2**30 + 64
    target = make_target(rng, rows, cols, adapters=adapters)

    def reserve(elements: int) -> np.ndarray:
        area = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        return np.frombuffer(area, np.uint16)

    try:
        live_area, a_area = reserve(rows * row_stride), reserve(adapters * adapter_stride)
    except OSError:
        pytest.skip("no address space for the reservation")
    live = np.lib.stride_tricks.as_strided(live_area, (rows, cols), (2 * row_stride, 2), writeable=True)
    a = np.lib.stride_tricks.as_strided(a_area, target.a.shape, (2 * adapter_stride, 2 * cols, 2), writeable=True)
    a[:] = target.a
    target.live, target.a = live, a
    launch = Launch(lib, [target])
    launch.switch([2, 1], [0.5, 0.5])
    check(target, launch, [2, 1], [0.5, 0.5])
