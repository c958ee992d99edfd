"""Fused application on every backend that runs the kernels, against float64: router, prologue, GEMV."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fusedmerge.backend import linear
from fusedmerge.backend.kernels import NativeLauncher
from fusedmerge.backend.linear import Known, Norm, Router, Silu
from fusedmerge.errors import InvalidValueError
from tests import linear_kit as kit
from tests.conftest import ON_GPU, ON_HOST, use_gpu, use_host

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[*(pytest.param(NativeLauncher(isa), id=isa) for isa in kit.ISAS), *ON_HOST, *ON_GPU])
def where(request, monkeypatch):
    """A backend; results and workspace are poisoned."""
    kit.poison(monkeypatch)
    if isinstance(request.param, NativeLauncher):
        return request.param
    if request.param in ("sim", "ptx"):
        use_host(request.param, request, monkeypatch)
        return "sim"
    use_gpu(request.param, request, monkeypatch)
    return request.param


def apply(where, problem, source=None):
    return linear.decode_group(where, problem.x, problem.targets, problem.known, source)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "cols", "rows", "rank"),
    [(1, 1, 1, 1), (1, 64, 16, 16), (3, 67, 35, 7), (8, 256, 40, 4), (9, 300, 17, 33), (16, 520, 33, 16), (2, 2056, 20, 64)],
)
def test_shapes(where, dtype, num_tokens, cols, rows, rank):
    problem = kit.make(num_tokens, cols, rows=(rows,), ranks=(rank,), dtype=dtype)
    for case in (problem, kit.cancelled(problem, problem.known)):
        kit.check(apply(where, case).ys[0], case.x, case.targets[0], case.known)


def test_rank_512_and_many_slots(where):
    problem = kit.make(2, 40, rows=(19,), ranks=(512,), adapters=40, k=32)
    problem = kit.cancelled(problem, problem.known)
    kit.check(apply(where, problem).ys[0], problem.x, problem.targets[0], problem.known)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_of_one_sign(where, dtype):
    """What a tensor core loses by truncation adds up: one chain over all columns would be far beyond the bound."""
    problem = kit.make(2, 16384, rows=(16,), ranks=(16,), dtype=dtype, positive=True)
    problem = kit.cancelled(problem, problem.known)
    kit.check(apply(where, problem).ys[0], problem.x, problem.targets[0], problem.known)


def test_several_targets_of_which_one_has_no_adapters(where):
    problem = kit.make(5, 130, rows=(48, 7, 16), ranks=(16, 5, 40))
    bare = replace(problem.targets[1], a=None, b=None, scaling=None)
    problem.targets[1] = bare
    for y, target in zip(apply(where, problem).ys, problem.targets, strict=True):
        kit.check(y, problem.x, target, problem.known)
    alone = linear.decode_group(where, problem.x, [bare], None).ys[0]
    kit.check(alone, problem.x, bare, None)


def test_without_scaling_bias_and_residual(where):
    problem = kit.make(2, 70, extras=False)
    target = problem.targets[0]
    y = linear.decode_linear(where, problem.x, target.weight, target.a, target.b, problem.ids, problem.gates)
    kit.check(y, problem.x, target, problem.known)


def test_no_tokens_no_rows_no_adapters_no_slots(where):
    problem = kit.make(2, 40)
    assert apply(where, problem.tokens([])).ys[0].shape == (0, 35)
    target = replace(problem.targets[0], weight=problem.targets[0].weight[:0], a=None, b=None, bias=None, residual=None)
    assert linear.decode_group(where, problem.x, [target]).ys[0].shape == (2, 0)
    target = replace(problem.targets[0], a=problem.targets[0].a[:0], b=problem.targets[0].b[:0])
    kit.check(linear.decode_group(where, problem.x, [target], problem.known).ys[0], problem.x, target, None)  # N = 0
    slotless = Known(problem.ids[:, :0], problem.gates[:, :0])
    kit.check(linear.decode_group(where, problem.x, problem.targets, slotless).ys[0], problem.x, problem.targets[0], slotless)


def test_too_much_is_refused(where):
    for problem in (kit.make(17, 8), kit.make(1, 8, rows=(1,) * 5), kit.make(1, 8, k=33)):
        with pytest.raises(InvalidValueError, match=r"at most (16 tokens|4 matrices|32 slots)"):
            apply(where, problem)
    problem = kit.make(1, 8, rows=(3, 4))
    problem.targets[1] = replace(problem.targets[1], a=problem.targets[1].a[:4], b=problem.targets[1].b[:4])
    with pytest.raises(InvalidValueError, match=r"targets: expected 5 adapters each, got \[4\]"):
        apply(where, problem)
    with pytest.raises(InvalidValueError, match=r"targets: expected 6 adapters each, got \[5\]"):  # the router's rows
        linear.decode_group(where, problem.x, problem.targets[:1], Router(torch.zeros(6, 8, dtype=problem.x.dtype), 2))
    with pytest.raises(InvalidValueError, match="route_topk: router_weight: .*at most 4096 adapters"):
        linear.route(where, problem.x, torch.zeros(4097, 8, dtype=problem.x.dtype), 2)


# ---- whose adapters -----------------------------------------------------------------------------------------------


def test_a_token_without_adapters_has_the_backbone_s_bits(where):
    problem = kit.make(4, 90, adapters=3)
    problem.ids[1] = -1
    plain = linear.decode_group(where, problem.x, problem.targets).ys[0]
    mixed = apply(where, problem).ys[0]
    assert np.array_equal(kit.bits(mixed[1]), kit.bits(plain[1])) and not np.array_equal(kit.bits(mixed), kit.bits(plain))
    problem.ids.fill_(-1)
    unread = replace(problem.targets[0], a=problem.targets[0].a * torch.nan, b=problem.targets[0].b * torch.nan)
    empty = linear.decode_group(where, problem.x, [unread], problem.known).ys[0]
    assert np.array_equal(kit.bits(empty), kit.bits(plain))


@pytest.mark.parametrize("ids", [[[2, 2]] * 9, [[0, 1], [2, 3], [4, 0]] * 3, [[-1, 3]] * 9])
def test_popularity(where, ids):
    problem = kit.make(9, 80, ranks=(20,))
    problem = replace(problem, ids=torch.tensor(ids, dtype=torch.int32))
    kit.check(apply(where, problem).ys[0], problem.x, problem.targets[0], problem.known)


@pytest.mark.parametrize("bad", [5, -2, 2**31 - 1])
def test_an_id_out_of_range_is_an_empty_slot(where, bad):
    problem = kit.make(3, 64)
    problem.ids[1, 0] = -1
    expected = apply(where, problem).ys[0]
    problem.ids[1, 0] = bad
    assert np.array_equal(kit.bits(apply(where, problem).ys[0]), kit.bits(expected))


@pytest.mark.parametrize("off", ["gate", "scaling", "routed"])
def test_a_gate_or_scaling_of_zero_is_no_adapter(where, off):
    """Whatever the factors hold."""
    problem = kit.make(3, 64)
    target = problem.targets[0]
    spoilt = replace(target, a=target.a.clone(), b=target.b.clone(), scaling=target.scaling.clone())
    spoilt.a[2], spoilt.b[2] = torch.nan, torch.nan
    problem.ids[1] = torch.tensor([2, 4])
    problem.ids[[0, 2]] = torch.tensor([0, 1], dtype=torch.int32)
    if off == "routed":  # the softmax of logits 200 apart is 1 and 0
        x, router = problem.x.abs(), torch.zeros(5, 64)
        router[0], router[2] = 1000.0, 1.0
        applied = linear.decode_group(where, x, [spoilt], Router(router, 2))
        taken = applied.routings[0]
        assert taken.ids.tolist() == [[0, 2]] * 3 and taken.gates.tolist() == [[1.0, 0.0]] * 3
        kit.check(applied.ys[0], x, target, taken)
        return
    if off == "gate":
        problem.gates[1, 0] = 0.0
    else:
        spoilt.scaling[2] = 0.0
    y = linear.decode_group(where, problem.x, [spoilt], problem.known).ys[0]
    problem.ids[1, 0] = -1
    kit.check(y, problem.x, target, problem.known)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [264, 2300])
def test_a_token_s_bits_do_not_depend_on_the_batch(where, cols):
    problem = kit.make(16, cols, rows=(20, 9), ranks=(16, 5))
    whole = apply(where, problem).ys
    for chosen in ([3], [15, 0, 7], [8, 1, 2, 3, 4, 5, 6, 7], [9, 9, 8, 1, 0, 14, 13, 2, 5]):
        part = apply(where, problem.tokens(chosen)).ys
        assert all(np.array_equal(kit.bits(y), kit.bits(all_of_it[chosen])) for y, all_of_it in zip(part, whole, strict=True))


def test_unaligned_rows_have_the_bits_of_aligned_ones(where):
    def shifted(tensor):
        """The same values, one element into a wider row."""
        moved = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)[..., 1 : tensor.shape[-1] + 1]
        return moved.copy_(tensor)

    problem = kit.make(9, 328, ranks=(24,))
    target = problem.targets[0]
    moved = replace(target, weight=shifted(target.weight), a=shifted(target.a), b=shifted(target.b), residual=shifted(target.residual))
    expected = apply(where, problem).ys[0]
    for x in (problem.x, shifted(problem.x)):
        got = apply(where, replace(problem, x=x, targets=[moved])).ys[0]
        assert np.array_equal(kit.bits(got), kit.bits(expected))


# ---- x that the prologue makes ------------------------------------------------------------------------------------------


def reference_norm(x, weight, epsilon):
    """Llama's, in torch: rounded after the scale and after the weight."""
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "cols"), [(1, 2500), (5, 67), (16, 264)])
def test_residual_and_norm(where, dtype, num_tokens, cols):
    problem = kit.make(num_tokens, cols, dtype=dtype)
    second, weight = torch.randn(num_tokens, cols).to(dtype), torch.rand(cols).to(dtype)
    applied = apply(where, problem, Norm(weight, 1e-5, second))
    assert torch.equal(applied.sum, problem.x + second)
    expected = reference_norm(problem.x + second, weight, 1e-5)
    off = np.abs(kit.wide(applied.x) - kit.wide(expected))
    assert (off <= 2 * kit.ulp(kit.wide(expected), dtype)).all() and (off > 0).mean() < 0.01
    kit.check(applied.ys[0], applied.x, problem.targets[0], problem.known)
    bare = apply(where, problem, Norm(weight, 1e-5))
    assert bare.sum is None and not torch.equal(bare.x, applied.x)
    off = np.abs(kit.wide(bare.x) - kit.wide(reference_norm(problem.x, weight, 1e-5)))
    assert (off > 0).mean() < 0.01
    kit.check(bare.ys[0], bare.x, problem.targets[0], problem.known)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_times_up(where, dtype):
    problem = kit.make(9, 300, dtype=dtype)
    up = torch.randn(9, 300).to(dtype)
    applied = apply(where, problem, Silu(up))
    expected = torch.nn.functional.silu(problem.x) * up
    off = np.abs(kit.wide(applied.x) - kit.wide(expected))
    assert (off <= 2 * kit.ulp(kit.wide(expected), dtype)).all() and (off > 0).mean() < 0.01
    kit.check(applied.ys[0], applied.x, problem.targets[0], problem.known)


def test_a_source_without_adapters(where):
    problem = kit.make(2, 100)
    applied = linear.decode_group(where, problem.x, problem.targets, None, Silu(problem.x))
    kit.check(applied.ys[0], applied.x, problem.targets[0], None)


def test_gates_after_the_non_linearity_are_pseudo_tokens(where):
    """MixLoRA: each of a token's experts has an MLP of its own. Every (token, expert) is a token with one slot; W is still read once."""
    problem = kit.make(3, 72, rows=(40, 40), ranks=(8,), extras=False)
    problem.ids.clamp_(min=0)
    down = kit.make(6, 40, rows=(72,), ranks=(8,), extras=False, seed=1).targets[0]
    each = Known(problem.ids.reshape(6, 1), torch.ones(6, 1))
    up = linear.decode_group(where, problem.x.repeat_interleave(2, 0), problem.targets, each)
    mlp = linear.decode_group(where, up.ys[0], [down], each, Silu(up.ys[1]))
    y = (mlp.ys[0].float() * problem.gates.reshape(6, 1)).reshape(3, 2, 72).sum(1)
    x, ids, gates = kit.wide(problem.x), problem.ids.tolist(), problem.gates.tolist()
    for t in range(3):
        exact = np.zeros(72)
        for n, gate in zip(ids[t], gates[t], strict=True):
            through = [kit.wide(m.weight) + kit.wide(m.b[n]) @ kit.wide(m.a[n]) for m in (*problem.targets, down)]
            hidden = through[0] @ x[t]
            exact += gate * (through[2] @ (hidden / (1 + np.exp(-hidden)) * (through[1] @ x[t])))
        assert np.abs(kit.wide(y[t]) - exact).max() < 2.0**-6 * np.abs(exact).max()


# ---- the router ------------------------------------------------------------------------------------------------------


def check_routing(x, weight, k, normalize, ids, gates):
    logits = kit.wide(x) @ kit.wide(weight).T  # [T, N]
    size = np.abs(kit.wide(x)) @ np.abs(kit.wide(weight)).T
    chosen = np.take_along_axis(logits, ids.cpu().numpy().astype(np.int64), 1)
    slack = 2.0**-20 * size.max()
    assert (np.diff(chosen, axis=1) <= slack).all() and (np.sort(logits, axis=1)[:, ::-1][:, :k] - chosen <= slack).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    among = chosen if normalize and k > 1 else logits
    top = chosen.max(1, keepdims=True)
    expected = np.exp(chosen - top) / np.exp(among - top).sum(1, keepdims=True)
    assert np.abs(kit.wide(gates) - expected).max() < 2.0**-18 * max(1, size.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "cols", "adapters", "k", "normalize"),
    [
        (1, 4096, 8, 2, True),
        (40, 67, 8, 2, False),
        (3, 129, 33, 1, True),
        (2, 9, 5, 5, True),
        (3, 64, 4096, 8, True),
        (1, 70, 300, 32, False),
    ],
)
def test_route(where, dtype, num_tokens, cols, adapters, k, normalize):
    x, weight = torch.randn(num_tokens, cols).to(dtype), torch.randn(adapters, cols) / cols**0.5
    for router in (weight.to(dtype), weight):
        ids, gates = linear.route(where, x, router, k, normalize)
        check_routing(x, router, k, normalize, ids, gates)


def test_ties_padding_and_nan(where):
    x = torch.randn(4, 40).to(torch.bfloat16)
    rows = torch.randn(2, 40).to(torch.bfloat16)
    weight = rows[[0, 1, 0, 1, 0, 1]]  # three of each logit
    x[3, 0] = torch.nan
    ids, gates = linear.route(where, x, weight, 4, True, mask=torch.tensor([1, 0, 7, 1], dtype=torch.int32))
    for row in (0, 2):
        assert sorted(ids[row, :3].tolist()) in ([0, 2, 4], [1, 3, 5]) and ids[row, :3].tolist() == sorted(ids[row, :3].tolist())
        assert ids[row, 3] == 1 - ids[row, 0] % 2
    assert ids[1].tolist() == [-1] * 4 and gates[1].tolist() == [0.0] * 4
    assert ids[3].tolist() == [-1] * 4  # no logit of this token can be compared


@pytest.mark.parametrize(("k", "normalize"), [(2, True), (3, False), (1, True)])
@pytest.mark.parametrize(("source", "dtype"), [(None, torch.float32), ("norm", torch.bfloat16)])
def test_a_layer_s_own_router(where, k, normalize, source, dtype):
    """The fused router chooses what `route` chooses from the same x, bit for bit, and all else follows from it."""
    problem = kit.make(9, 2100, rows=(20, 9), ranks=(8, 20), adapters=11)
    weight = torch.randn(11, 2100).to(dtype)
    given = Norm(torch.rand(2100).to(torch.bfloat16), 1e-6) if source else None
    applied = linear.decode_group(where, problem.x, problem.targets, Router(weight, k, normalize), given)
    ids, gates = linear.route(where, applied.x, weight, k, normalize)
    assert all(torch.equal(taken.ids, ids) and torch.equal(taken.gates, gates) for taken in applied.routings)
    known = linear.decode_group(where, problem.x, problem.targets, Known(ids, gates), given)
    for y, same, target in zip(applied.ys, known.ys, problem.targets, strict=True):
        kit.check(y, applied.x, target, Known(ids, gates))
        assert np.array_equal(kit.bits(y), kit.bits(same))


def listed(routings):
    return [None if taken is None else (taken.ids.tolist(), taken.gates.tolist()) for taken in routings]


@pytest.mark.parametrize(
    ("num_tokens", "adapters", "k", "normalize", "dtype"),
    [
        (1, 8, 2, True, torch.bfloat16),
        (5, 11, 1, True, torch.float32),
        (16, 11, 4, False, torch.bfloat16),
        (9, 16, 16, True, torch.float32),
        (3, 1, 1, True, torch.bfloat16),
    ],
)
def test_a_router_for_each_target(where, num_tokens, adapters, k, normalize, dtype):
    """Each target's y, ids and gates are bit for bit those of a group of its own; a target without a router has the backbone's y."""
    problem = kit.make(num_tokens, 2100, rows=(40, 9, 33, 20), ranks=(8, 20, 16, 3), adapters=adapters)
    first, second = (Router(weight.to(dtype), k, normalize) for weight in torch.randn(2, adapters, 2100))
    routers = [first, None, second, first]
    applied = linear.decode_group(where, problem.x, problem.targets, routers)
    for target, router, y, taken in zip(problem.targets, routers, applied.ys, applied.routings, strict=True):
        alone = linear.decode_group(where, problem.x, [target], router)
        assert np.array_equal(kit.bits(y), kit.bits(alone.ys[0])) and listed([taken]) == listed(alone.routings)
        kit.check(y, problem.x, target, taken)
        if router is not None:
            ids, gates = linear.route(where, problem.x, router.weight, k, normalize)
            assert torch.equal(taken.ids, ids) and torch.equal(taken.gates, gates)
    if k < adapters:
        assert not torch.equal(applied.routings[0].ids, applied.routings[2].ids)


def test_routers_of_one_launch_see_the_norm_s_x_and_may_be_unaligned(where):
    problem = kit.make(5, 264, rows=(20, 9, 33), ranks=(16, 5, 8))
    norm = Norm(torch.rand(264).to(torch.bfloat16), 1e-6, torch.randn(5, 264).to(torch.bfloat16))
    weights = torch.randn(5, 3, 265).to(torch.bfloat16)[:, :, 1:].unbind(1)  # strided, and off 16 bytes
    applied = linear.decode_group(where, problem.x, problem.targets, [Router(weight, 2) for weight in weights], norm)
    for y, weight, target, taken in zip(applied.ys, weights, problem.targets, applied.routings, strict=True):
        ids, gates = linear.route(where, applied.x, weight.contiguous(), 2)
        assert torch.equal(taken.ids, ids) and torch.equal(taken.gates, gates)
        kit.check(y, applied.x, target, taken)


def test_routers_that_cannot_share_a_launch_are_refused(where):
    problem = kit.make(1, 8, rows=(3, 4), adapters=40)
    weight = torch.zeros(40, 8, dtype=problem.x.dtype)
    first = Router(weight, 2)
    for other in (Router(weight[:39], 2), Router(weight, 3), Router(weight, 2, False), Router(weight.float(), 2), problem.known):
        with pytest.raises(InvalidValueError, match="lora_linear: routing: expected routers of one N, k, normalize and dtype"):
            linear.decode_group(where, problem.x, problem.targets, [first, other])
    with pytest.raises(InvalidValueError, match="routing: expected routers of one N, k, normalize and dtype, or one choice"):
        linear.decode_group(where, problem.x, problem.targets, [problem.known, Known(problem.ids, problem.gates)])
    with pytest.raises(InvalidValueError, match="routing: expected one for each of 2 targets, got 1"):
        linear.decode_group(where, problem.x, problem.targets, [first])
    with pytest.raises(InvalidValueError, match="at most 32 slots of a token in a launch, got 34"):
        linear.decode_group(where, problem.x, problem.targets, [Router(weight, 17), Router(weight, 17)])
    with pytest.raises(InvalidValueError, match=r"targets: expected 40 adapters each, got \[40, 39\]"):
        problem.targets[1] = replace(problem.targets[1], a=problem.targets[1].a[:39], b=problem.targets[1].b[:39])
        linear.decode_group(where, problem.x, problem.targets, [first, Router(weight, 2)])
