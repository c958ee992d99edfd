"""The performance model against figures worked out by hand (the papers' models), and against the planner's byte counts."""

from __future__ import annotations

import ctypes

import pytest

from fusedmerge.backend import params
from perf import model
from perf.backbones import LLAMA_2_7B, LLAMA_3_8B, LLAMA_70B_LAYER, MISTRAL_7B
from perf.model import Ceilings, Cost

SHAPES = LLAMA_2_7B.shapes
WEIGHTS = 6_476_005_376  # 32 layers of 4 x 4096 x 4096 + 3 x 4096 x 11008
FACTORS = 319_815_680  # one adapter of rank 64 in 16 bits; the planner says the same (tests/test_sim_plan.py)


def test_shapes():
    assert LLAMA_2_7B.adapted == WEIGHTS and LLAMA_2_7B.head == 131_072_000
    assert len(SHAPES) == 224
    assert LLAMA_3_8B.adapted == MISTRAL_7B.adapted == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert LLAMA_70B_LAYER.adapted == 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    small = MISTRAL_7B.scaled(640, 3)
    assert (small.hidden, small.intermediate, small.kv, small.layers) == (640, 2240, 160, 3)
    assert small.name == "Mistral-7B in small (640 wide, 3 layers)"


def test_switch():
    exact = model.switch_exact(SHAPES, r=64, k=2)
    assert model.factor_bytes(SHAPES, 64) == FACTORS
    assert exact == Cost(2 * WEIGHTS + 2 * FACTORS, 2 * WEIGHTS, 2 * WEIGHTS * 128, 1)
    assert exact.bytes == pytest.approx(26.54e9, rel=1e-3)
    assert exact.flops == pytest.approx(1.66e12, rel=2e-3)
    inplace = model.switch_inplace(SHAPES, r=64, k=2)
    assert inplace.bytes - 4 * FACTORS == pytest.approx(25.9e9, rel=1e-3)  # what merging moves of the weights alone
    assert inplace.flops == 2 * exact.flops
    assert model.switch_inplace(SHAPES, 64, k=2, k_old=0) == exact
    from_fp8 = model.switch_exact(SHAPES, 64, 2, base=1)
    assert exact.bytes - from_fp8.bytes == WEIGHTS
    assert model.factor_bytes([(40, 30)], 8) == 2 * 16 * 70  # padded to 16


def test_peft_and_the_loops():
    """311 GB with bfloat16 adapters and 518 GB with float32 ones, for two adapters of rank 64; factors are a few percent more."""
    matrices = [(6_476_005_376, 1)]  # the same weights in one matrix, whose factors are nothing beside them
    for itemsize, gigabytes in ((2, 311), (4, 518)):
        factors = 4 * itemsize * 64 * (WEIGHTS + 1)
        assert model.peft(matrices, 64, 2, itemsize).bytes - factors == pytest.approx(gigabytes * 1e9, rel=1e-3)
    assert model.peft(SHAPES, 64, 2).launches == 4 * 3 * 224
    assert model.addmm_float32([(10, 20)], 16, 2).flops == 2 * 200 * 32
    loop = model.addmm_bfloat16(SHAPES, 64, 2)
    assert loop.bytes == 8 * WEIGHTS + 6 * 2 * FACTORS
    wide = model.addmm_float32(SHAPES, 64, 2)
    assert wide.bytes == (6 + 6) * WEIGHTS + 2 * (8 * WEIGHTS + 5 * FACTORS)


def test_decode_step():
    step = model.backbone_step(LLAMA_2_7B)
    assert step.read == pytest.approx(13.2e9, rel=2e-3)
    assert step.read / 2.4e-3 == pytest.approx(5.5e12, rel=5e-3)  # what 2.4 ms would need
    for r, extra in ((64, 0.64e9), (16, 0.16e9)):
        fused = model.fused_step(LLAMA_2_7B, r, num_adapters=8, k=2)
        assert fused.read - step.read == pytest.approx(extra, rel=2e-3)
    assert model.fused_step(LLAMA_2_7B, 64, 8, 2).read / step.read == pytest.approx(1.048, abs=5e-4)
    assert model.fused_step(LLAMA_2_7B, 16, 8, 2).read / step.read == pytest.approx(1.012, abs=5e-4)
    assert model.backbone_step(LLAMA_2_7B, tokens=3, context=100).read - step.read == 3 * 100 * 2 * 4096 * 32 * 2
    assert model.fused_step(LLAMA_2_7B, 64, 8, 2).launches - step.launches == 32


@pytest.mark.parametrize(("tokens", "floor"), [(2, 1.085), (4, 1.13), (8, 1.17), (16, 1.19)])
def test_floors_of_differing_routes(tokens, floor):
    fused, plain = model.fused_step(LLAMA_2_7B, 64, 8, 2, tokens), model.backbone_step(LLAMA_2_7B, tokens)
    assert fused.read / plain.read == pytest.approx(floor, abs=0.006)


def test_time():
    rates = Ceilings(copy=4e12, read=5e12, flops=6e14, flops_float32=5e13, launch=2e-6)
    assert model.seconds(model.copy(8e12), rates) == 2.0
    assert model.seconds(Cost(5e12, 0), rates) == 1.0
    assert model.seconds(Cost(3e12, 1e12), rates) == pytest.approx(2e12 / 4e12 + 2e12 / 5e12)
    assert model.seconds(Cost(1e12, 3e12), rates) == pytest.approx(2e12 / 4e12 + 2e12 / 4e12)
    assert model.seconds(Cost(1, 1, flops=6e14), rates) == 1.0
    assert model.seconds(Cost(1, 1, flops=5e13), rates, float32=True) == 1.0
    assert model.seconds(Cost(1, 1, launches=1000), rates) == pytest.approx(2e-3)
    exact, inplace = (f(SHAPES, 64, 2) for f in (model.switch_exact, model.switch_inplace))
    assert model.seconds(exact, rates) == pytest.approx(4 * WEIGHTS / 4e12 + 2 * FACTORS / 5e12)  # bound by memory
    assert model.seconds(inplace, rates) < 1.1 * model.seconds(exact, rates)


def test_lora_linear():
    cost = model.lora_linear(rows=30, cols=20, r=16, num_adapters=8, k=2, tokens=1)
    assert cost == Cost(2 * (600 + 20) + 2 * 2 * 16 * 50, 2 * 30, 2 * (600 + 2 * 16 * 50), 2)


@pytest.mark.parametrize(("source", "base"), [(params.BF16, 2), (params.FP8, 1)])
def test_the_planner_counts_the_same_bytes(source, base):
    plan_switch = pytest.importorskip("fusedmerge._ext").plan_switch
    for shapes, r in ((SHAPES, 64), (LLAMA_70B_LAYER.shapes, 8)):
        rank = model.factor_bytes([(1, 0)], r) // 2
        table, result = (params.SwitchSegment * len(shapes))(), params.PlanResult()
        for segment, (rows, cols) in zip(table, shapes, strict=True):
            segment.rows, segment.cols, segment.rank = rows, cols, rank
            segment.live, segment.source, segment.a, segment.b, segment.scaling = 4096, 8192, 4096, 4096, 4096
            segment.live_stride = segment.source_stride = segment.a_row_stride = cols
            segment.b_row_stride = rank
            segment.scale_row_shift = segment.scale_col_shift = 31
        request = params.PlanRequest(params.BF16, source, params.BF16, 0, len(shapes), 8, 2, 132, 227 << 10)
        assert plan_switch(*map(ctypes.addressof, (request, table, result))), result.error
        cost = model.switch_exact(shapes, r, 2, base)
        assert result.source_bytes + 2 * result.adapter_bytes == cost.read
        assert result.live_bytes == cost.written
