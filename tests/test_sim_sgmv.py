"""The SGMV kernels' own sources on the host simulator, against float64: values, bits, addresses."""

from __future__ import annotations

import mmap

import mixtures
import numpy as np
import pytest
import torch
from mixtures import POPULARITIES, Device, check, make_batch, strided

from fusedmerge.backend import sgmv
from tests import kit

DTYPES = (torch.bfloat16, torch.float16)
RANKS = (1, 4, 7, 16, 33, 64, 128)


pytestmark = pytest.mark.usefixtures("on_host")


def bits(tensor):
    return tensor.contiguous().view(torch.int16).numpy().tobytes()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity(rng, popularity, dtype):
    batch = make_batch(rng, 50, 136, 88, 16, slots=2, adapters=12, popularity=popularity, dtype=dtype)
    check(batch, batch.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [*RANKS, pytest.param(512, marks=pytest.mark.slow)])
def test_ranks(rng, rank, dtype):
    batch = make_batch(rng, 13, 96, 72, rank, adapters=3, dtype=dtype)
    check(batch, batch.run())


@pytest.mark.parametrize(
    ("tokens", "cols", "out", "rank", "slots"),
    [
        (1, 64, 40, 8, 2),
        (7, 1, 1, 3, 1),
        (8, 33, 31, 5, 2),
        (9, 511, 257, 16, 1),
        (17, 513, 33, 20, 3),
        (130, 40, 300, 4, 2),
        (3, 1025, 9, 17, 8),
    ],
)
def test_shapes(rng, tokens, cols, out, rank, slots):
    batch = make_batch(rng, tokens, cols, out, rank, slots=slots, none=0.0)
    check(batch, batch.run())


@pytest.mark.parametrize("seed", kit.fast_first(range(24), 5))
def test_random_batches(seed):
    """Everything at once: sizes, slots, popularity, dtype, alignment, device, order."""
    rng = np.random.default_rng(seed)
    tokens, cols, out, rank = (int(n) for n in rng.integers(1, (120, 700, 300, 150)))
    slots, adapters = int(rng.integers(1, 9)), int(rng.integers(1, 40))
    dtype, popularity = DTYPES[seed % 2], POPULARITIES[seed % 5]
    batch = make_batch(rng, tokens, cols, out, rank, slots=slots, adapters=adapters, dtype=dtype, popularity=popularity)
    batch.ranks = torch.from_numpy(rng.integers(0, rank + 1, adapters).astype(np.int32)) if seed % 3 == 0 else None
    for field in ("y", "x", "a", "b"):
        gap, shift = rng.integers(0, 9, 2) if rng.random() < 0.5 else (-getattr(batch, field).shape[-1] % 8, 0)
        setattr(batch, field, strided(getattr(batch, field), int(gap), int(shift)))
    device = Device(seed % 3, core=seed % 2, seed=seed, multiprocessors=(1, 4, 132)[seed % 3], shared=(30 << 10, 227 << 10)[seed % 2])
    check(batch, batch.run(device), share=0.998)


@pytest.mark.parametrize("core", [0, 1], ids=["a100", "h100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_one_sign(rng, dtype, core):
    """Tensor cores truncate: a single chain over these columns loses more than the bound."""
    batch = make_batch(rng, 3, 11008, 24, 16, adapters=2, dtype=dtype, none=0.0)
    for tensor in (batch.x, batch.a, batch.b, batch.gates):
        tensor.abs_()
    batch.y.zero_()
    check(batch, batch.run(Device(core=core)), slack=2.0**-17)


@pytest.mark.parametrize(("x_size", "b_size"), [(3000.0, 1e-3), (1e-4, 1000.0), (1.0, 6e-6)])
def test_z_beyond_the_range_of_fp16(rng, x_size, b_size):
    """z reaches 1e7 here, or 1e-9; y is an ordinary number."""
    batch = make_batch(rng, 20, 300, 120, 24, dtype=torch.float16, none=0.0)
    batch.x *= x_size
    batch.a *= 17 if x_size > 1 else 0.01
    batch.b *= b_size * 10
    batch.y *= 0.01
    assert x_size > 1 or b_size < 1 or (batch.x.double() @ batch.a[0].double().T).abs().median() < 2.0**-14
    check(batch, batch.run(), share=0.97)


def test_other_ranks_for_each_adapter(rng):
    batch = make_batch(rng, 40, 70, 90, 80, adapters=6)
    batch.ranks = torch.tensor([80, 0, 17, 5, 64, 65], dtype=torch.int32)
    poisoned = batch.a.clone(), batch.b.clone()
    for n, rank in enumerate(batch.ranks.tolist()):  # beyond an adapter's rank nothing may be read
        poisoned[0][n, rank:] = torch.nan
        poisoned[1][n, :, rank:] = torch.nan
    batch.a, batch.b = poisoned
    batch.ids[7] = 1  # has no rank here
    batch.y[7, ::2] = -0.0
    y = batch.run()
    check(batch, y)
    assert bits(y[7]) == bits(batch.y[7])


@pytest.mark.parametrize("absent", ["rank", "scaling"])
def test_every_tile_begins_with_an_expert_that_adds_nothing(rng, absent):
    """One block walks all tiles: it may not begin the next one's sums before the last one's are read."""
    batch = make_batch(rng, 40, 70, 90, 80, adapters=3)
    batch.ids[:, 0] = 0
    batch.ids[:, 1] = 1 + batch.ids[:, 1].abs() % 2
    if absent == "rank":
        batch.ranks = torch.tensor([0, 80, 70], dtype=torch.int32)
    else:
        batch.scaling[0] = 0.0
    poisoned = mixtures.Batch(**vars(batch))
    poisoned.b = batch.b.clone()
    poisoned.b[0] = torch.nan
    check(batch, poisoned.run(Device(grid=1)))


def test_no_scaling(rng):
    batch = make_batch(rng, 20, 70, 90, 8)
    batch.scaling = None
    check(batch, batch.run())


def test_tokens_without_an_adapter_keep_their_bits(rng):
    batch = make_batch(rng, 30, 70, 90, 8)
    batch.ids[::3] = -1
    batch.gates[1] = 0.0
    kept = [t for t in range(30) if t % 3 == 0 or t == 1]
    batch.y[kept, :3] = torch.tensor([-0.0, torch.nan, torch.inf], dtype=torch.bfloat16)
    y = batch.run()
    assert bits(y[kept]) == bits(batch.y[kept])
    rest = [t for t in range(30) if t not in kept]
    assert (y[rest] != batch.y[rest]).any(1).sum() == (batch.ids[rest] >= 0).any(1).sum()


def test_no_adapter_at_all(rng):
    batch = make_batch(rng, 20, 70, 90, 8, none=1.0)
    batch.x[:] = torch.nan  # is not even read
    device = Device()
    assert bits(batch.run(device)) == bits(batch.y)
    empty = torch.zeros(20, 0, dtype=torch.int32), torch.zeros(20, 0)
    for ids, gates, a in ((*empty, batch.a), (batch.ids, batch.gates, batch.a[:0])):
        device = Device()
        y = batch.y.clone()
        sgmv.add_adapters(device, y, batch.x, a, batch.b[: len(a)], ids, gates)
        assert bits(y) == bits(batch.y) and device.launches == []


def test_what_is_not_finite_stays_with_its_token(rng):
    batch = make_batch(rng, 40, 70, 90, 8, none=0.0)
    clean = batch.run()
    batch.x[3, 69], batch.x[17, 0], batch.gates[21, 1] = torch.nan, torch.inf, torch.nan
    y = batch.run()
    bad = [3, 17, 21]
    assert not y[bad].isfinite().any()
    rest = [t for t in range(40) if t not in bad]
    assert bits(y[rest]) == bits(clean[rest])


# ---- several targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_columns_of_packed_outputs(rng, odd):
    """q, k and v as ranges of one matrix, with other ranks and sizes, in one launch; what lies between is untouched."""
    widths, ranks = ((264, 72, 80) if not odd else (257, 71, 83)), (16, 8, 40)
    base = make_batch(rng, 37, 200, 1, 1, adapters=4)
    packed = torch.from_numpy(rng.standard_normal((37, sum(widths) + 3 * 8))).bfloat16()
    before, at, targets, batches = packed.clone(), 0, [], []
    for width, rank in zip(widths, ranks, strict=True):
        own = make_batch(rng, 37, 200, width, rank, adapters=4)
        own.x, own.ids, own.gates, own.y = base.x, base.ids, base.gates, before[:, at : at + width]
        targets.append(sgmv.Target(packed[:, at : at + width], own.a, own.b, own.scaling))
        batches.append((own, at))
        at += width + 8
    device = Device()
    sgmv.add_to_targets(device, base.x, targets, sgmv.group_tokens(device, base.ids, base.gates, 4))
    assert device.launches == ["group_small", "sgmv_shrink_bf16_64", "sgmv_expand_bf16_64"]
    for own, first in batches:
        check(own, packed[:, first : first + own.y.shape[1]])
        gap = slice(first + own.y.shape[1], first + own.y.shape[1] + 8)
        assert bits(packed[:, gap]) == bits(before[:, gap])


def test_more_targets_than_a_launch_takes(rng):
    batches = [make_batch(rng, 20, 40, 16 + n, 4 + n) for n in range(6)]
    for batch in batches:
        batch.x, batch.ids, batch.gates = batches[0].x, batches[0].ids, batches[0].gates
    ys = [batch.y.clone() for batch in batches]
    groups = sgmv.group_tokens("sim", batches[0].ids, batches[0].gates, 5)
    targets = [sgmv.Target(y, batch.a, batch.b, batch.scaling) for y, batch in zip(ys, batches, strict=True)]
    sgmv.add_to_targets("sim", batches[0].x, targets, groups)
    for y, batch in zip(ys, batches, strict=True):
        check(batch, y)


def test_few_ranks_have_the_same_bits_beside_many(rng):
    """A target of 16 ranks has kernels of its own, unless the launch has another one of more."""
    few, many = make_batch(rng, 30, 600, 90, 16), make_batch(rng, 30, 600, 90, 40)
    groups = sgmv.group_tokens("sim", few.ids, few.gates, 5)
    alone = few.run(groups=groups)
    y, device = few.y.clone(), Device()
    targets = [sgmv.Target(y, few.a, few.b, few.scaling), sgmv.Target(many.y.clone(), many.a, many.b, many.scaling)]
    sgmv.add_to_targets(device, few.x, targets, groups)
    assert device.launches[-1] == "sgmv_expand_bf16_64" and bits(y) == bits(alone)


def test_groups_serve_every_layer(rng):
    first, second = make_batch(rng, 30, 70, 90, 8), make_batch(rng, 30, 48, 33, 20)
    second.ids, second.gates = first.ids, first.gates
    groups = sgmv.group_tokens("sim", first.ids, first.gates, 5)
    for batch in (first, second):
        check(batch, batch.run(groups=groups))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_whatever_runs_it(rng, dtype):
    """Thread orders, resident blocks, grids, sizes of tiles, and parts of z added by the shrink or apart."""
    batch = make_batch(rng, 140, 1100, 290, 24, adapters=6, dtype=dtype)
    batch.x, batch.y = batch.x[:, :1060], batch.y[:, :280]
    batch.a, batch.b = batch.a[..., :1060], batch.b[:, :280]
    seen, kernels = set(), set()
    devices = [
        Device(0, grid=1, multiprocessors=1),
        Device(1, grid=2, blocks=3, multiprocessors=132),
        Device(2, grid=5, seed=3, shared=227 << 10),
        Device(2, multiprocessors=132, seed=4, shared=20 << 10),
    ]
    for device in devices:
        seen.add(bits(batch.run(device)))
        kernels.add(any("sum" in name for name in device.launches))
    assert len(seen) == 1 and kernels == {False, True}


def test_a_tokens_bits_depend_on_its_own_mixture_alone(rng):
    batch = make_batch(rng, 70, 300, 100, 24, slots=3)
    whole = batch.run()
    for t in (0, 33, 69):
        order = [2, 0, 1]  # nor on the order of its slots
        alone = mixtures.Batch(
            batch.y[t : t + 1],
            batch.x[t : t + 1],
            batch.a,
            batch.b,
            batch.ids[t : t + 1, order],
            batch.gates[t : t + 1, order],
            batch.scaling,
        )
        assert bits(alone.run()) == bits(whole[t : t + 1])


@pytest.mark.parametrize(("gap", "shift"), [(1, 0), (8, 3), (7, 5)])
def test_scalar_rows_have_the_bits_of_vector_rows(rng, gap, shift):
    """Each operand alone, then all of them, unaligned."""
    batch = make_batch(rng, 20, 104, 120, 24)
    fields = ("y", "x", "a", "b")
    for field in fields:
        setattr(batch, field, strided(getattr(batch, field)))
    vector = bits(batch.run())
    for chosen in (*((field,) for field in fields), fields):
        changed = mixtures.Batch(**vars(batch))
        for field in chosen:
            setattr(changed, field, strided(getattr(batch, field), gap, shift))
        assert bits(changed.run()) == vector


# ---- addresses and refusals ------------------------------------------------------------------------------------------


def test_offsets_past_2_to_the_31_elements(rng):
    """Huge strides over address space that is reserved, not used: only the touched pages exist."""
    batch = make_batch(rng, 3, 40, 24, 16, adapters=3, none=0.0)

    def spread(values, stride):
        count = (len(values) - 1) * stride + values[0].numel()
        area = np.frombuffer(mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000), np.int16)  # MAP_NORESERVE
        whole = torch.from_numpy(area).view(values.dtype)
        return whole.as_strided(values.shape, (stride, *values.stride()[1:])).copy_(values)

    try:
        y, x = (spread(tensor, 2**31 + 64) for tensor in (batch.y, batch.x))
        a, b = (spread(tensor, 5 * 2**28 + 64) for tensor in (batch.a, batch.b))
    except OSError:
        pytest.skip("no address space for the reservation")
    sgmv.add_adapters("sim", y, x, a, b, batch.ids, batch.gates, batch.scaling)
    check(batch, y)


def test_what_does_not_fit_is_refused_and_changes_nothing(rng):
    batch = make_batch(rng, 20, 70, 90, 8)
    y = batch.y.clone()
    with pytest.raises(ValueError, match=r"lora_linear: ids: expected at most 32 slots of a token .*, got 33"):
        sgmv.group_tokens("sim", torch.zeros(2, 33, dtype=torch.int32), torch.zeros(2, 33), 4)
    with pytest.raises(ValueError, match=r"lora_linear: a: expected at most 4096 adapters .*, got 4097"):
        sgmv.group_tokens("sim", batch.ids, batch.gates, 4097)
    for ids, adapters in ((batch.ids[:19], 5), (batch.ids, 6)):
        groups = sgmv.group_tokens("sim", ids, batch.gates[: len(ids)], adapters)
        with pytest.raises(ValueError, match=r"groups: expected those of 20 tokens and 5 adapters, got"):
            sgmv.add_adapters("sim", y, batch.x, batch.a, batch.b, batch.ids, batch.gates, groups=groups)
    assert bits(y) == bits(batch.y)


def test_the_version_counter_tells_of_the_write(rng):
    batch = make_batch(rng, 5, 16, 16, 4)
    y, version = batch.y, batch.y._version
    sgmv.add_adapters("sim", y, batch.x, batch.a, batch.b, batch.ids, batch.gates)
    assert y._version > version
