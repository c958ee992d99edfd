"""What is the CPU kernels' own: threads, forks, the subnormal numbers of bfloat16 pairs, and what else uses them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mixtures
import pytest
import torch

import fusedmerge as fm
from fusedmerge import _ext
from fusedmerge.backend import linear
from fusedmerge.backend.kernels import NativeLauncher
from fusedmerge.backend.linear import Target
from tests import linear_kit as kit


@pytest.fixture
def problem():
    """Large enough for several threads."""
    return kit.make(3, 1024, rows=(700, 130), ranks=(40, 8))


def run(problem, threads, isa=""):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [kit.bits(y) for y in linear.decode_group(NativeLauncher(isa), problem.x, problem.targets, problem.known).ys]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", kit.ISAS)
def test_the_bits_do_not_depend_on_threads(problem, isa):
    alone = run(problem, 1, isa)
    for y, target in zip(alone, problem.targets, strict=True):
        kit.check(torch.from_numpy(y).view(torch.bfloat16), problem.x, target, problem.known)
    for threads in (2, 5):
        for _ in range(20):
            assert all((x == y).all() for x, y in zip(alone, run(problem, threads, isa), strict=True))


def test_callers_of_several_threads(problem):
    alone = run(problem, 1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: linear.decode_group("native", problem.x, problem.targets, problem.known).ys, range(60)):
            assert all((x == kit.bits(y)).all() for x, y in zip(alone, found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(problem):
    expected = run(problem, 3)
    child = os.fork()
    if child == 0:
        same = all((x == y).all() for x, y in zip(expected, run(problem, 3), strict=True))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all((x == y).all() for x, y in zip(expected, run(problem, 3), strict=True))


@pytest.mark.parametrize("isa", kit.ISAS)
def test_non_finite_weights_stay_in_their_rows(isa):
    problem = kit.make(2, 77, rows=(21,), ranks=(3,), extras=False)
    weight = problem.targets[0].weight
    weight[4, 76], weight[9, 0] = float("inf"), float("nan")
    y = linear.decode_group(NativeLauncher(isa), problem.x, problem.targets, problem.known).ys[0].float()
    assert y[:, 4].isinf().all() and y[:, 9].isnan().all()
    assert torch.cat([y[:, :4], y[:, 5:9], y[:, 10:]], dim=1).isfinite().all()


def test_the_flushing_of_subnormals_that_a_process_asks_for_changes_nothing():
    problem = kit.make(1, 64, rows=(19,), dtype=torch.float16)
    target = problem.targets[0]
    target.weight.mul_(2.0**-12)  # subnormal, most of them
    expected = run(problem, 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        found = run(problem, 1)
    finally:
        torch.set_flush_denormal(False)
    assert (expected[0] == found[0]).all()
    kit.check(torch.from_numpy(found[0]).view(torch.float16), problem.x, target, problem.known)


@pytest.mark.parametrize("isa", kit.ISAS)
def test_subnormal_weights_count_but_where_pairs_are_multiplied(isa):
    """There they are 0 (docs/fused.md)."""
    x, weight = torch.full((1, 64), 2.0**20).bfloat16(), torch.full((3, 64), 2.0**-130).bfloat16()
    y = linear.decode_group(NativeLauncher(isa), x, [Target(weight)]).ys[0]
    assert (y == (0.0 if isa == "avx512bf16" else 64 * 2.0**-110)).all()


def test_what_is_unknown_is_refused(problem):
    with pytest.raises(ValueError, match=r"linear_cpu: name: expected a kernel's, got sgmv_sum_bf16"):
        _ext.linear_cpu("sgmv_sum_bf16", 1, 0, 1)
    with pytest.raises(ValueError, match=r"linear_cpu: isa: expected one of isas\(\), got sse9"):
        run(problem, 1, "sse9")


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_linear_runs_it_for_few_tokens_of_16_bits(monkeypatch, tokens, dtype):
    problem, seen = kit.make(tokens, 96, dtype=dtype), []
    target, kernel = replace(problem.targets[0], residual=None), NativeLauncher.launch
    monkeypatch.setattr(
        NativeLauncher, "launch", lambda self, given, *rest, **more: (seen.append(given.name), kernel(self, given, *rest, **more))
    )
    y = fm.lora_linear(problem.x, target.weight, target.a, target.b, problem.ids, problem.gates, target.scaling, target.bias)
    name = f"{'bf16' if dtype == torch.bfloat16 else 'fp16'}_{8 if tokens == 1 else 16}"
    assert seen == ([] if dtype == torch.float32 else [f"prologue_{name}", f"gemv_{name}"])
    if seen:
        kit.check(y, problem.x, target, problem.known)


# ---- many tokens -----------------------------------------------------------------------------------------------------


def add(batch, isa="", ids=None, gates=None):
    y = batch.y.clone()
    target = Target(torch.empty(*batch.y.shape[1:], batch.x.shape[1]), batch.a, batch.b, batch.scaling)
    linear.add_on_cpu(y, batch.x, target, batch.ids if ids is None else ids, batch.gates if gates is None else gates, isa)
    return y


@pytest.mark.parametrize("isa", kit.ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (60, 200, 130, 20), (17, 33, 7, 64), (33, 1100, 19, 8)])
def test_many_tokens(rng, isa, dtype, shape):
    batch = mixtures.make_batch(rng, *shape, dtype=dtype)
    mixtures.check(batch, add(batch, isa))


@pytest.mark.parametrize("popularity", mixtures.POPULARITIES)
def test_popularity(rng, popularity):
    batch = mixtures.make_batch(rng, 200, 64, 48, 16, adapters=9, popularity=popularity)
    mixtures.check(batch, add(batch))


def test_a_token_s_bits_depend_on_its_mixture_alone(rng):
    batch = mixtures.make_batch(rng, 90, 300, 70, 16, slots=4, adapters=5)
    batch.ids[3] = torch.tensor([2, -1, 2, 7], dtype=torch.int32)  # twice, none, and one that does not exist
    batch.ids[4] = -1
    expected = kit.bits(add(batch))
    order = torch.randperm(4)
    turned = kit.bits(add(batch, ids=batch.ids[:, order].contiguous(), gates=batch.gates[:, order].contiguous()))
    few = torch.tensor([max(row.count(e) for e in row) < 3 for row in batch.ids.tolist()])  # the sum of three gates knows an order
    assert few[3] and few.sum() > 60 and (turned[few] == expected[few]).all()
    assert (expected[4] == kit.bits(batch.y[4])).all()
    few = replace(batch, y=batch.y[30:50], x=batch.x[30:50], ids=batch.ids[30:50], gates=batch.gates[30:50])
    assert (kit.bits(add(few)) == expected[30:50]).all()
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert (kit.bits(add(batch)) == expected).all()
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("off", ["gates", "scaling"])
def test_a_gate_or_scaling_of_zero_is_no_adapter(rng, off):
    spoilt, without = mixtures.switched_off(mixtures.make_batch(rng, 20, 70, 50, 20, adapters=3), off)
    assert torch.equal(add(spoilt), add(without))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_linear_adds_to_torch_s_linear(rng, dtype):
    batch = mixtures.make_batch(rng, 40, 120, 64, 8, dtype=dtype)
    weight = torch.randn(64, 120).to(dtype) / 11
    y = fm.lora_linear(batch.x, weight, batch.a, batch.b, batch.ids, batch.gates, batch.scaling)
    assert torch.equal(y, add(replace(batch, y=torch.nn.functional.linear(batch.x, weight))))
