"""`lora_linear`, `route_topk` and `crossover` on a GPU: what needs one. Values by every backend: tests/test_ops.py."""

import math

import pytest
import torch

import fusedmerge as fm
from fusedmerge import cost
from tests import ops_kit

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["jit", "aot"])
def on_gpu(request, monkeypatch):
    status = fm.backends()[request.param]
    assert status, status.reason
    monkeypatch.setenv("FUSEDMERGE_BACKEND", request.param)


def make(tokens, dtype=torch.bfloat16, **options):
    operands = ops_kit.make(tokens, num_adapters=6, r=16, n_in=64, n_out=48, dtype=dtype, **options)
    operands = operands._replace(a=operands.a.nan_to_num(), b=operands.b.nan_to_num())
    return type(operands)(*(t if t is None else t.cuda() for t in operands))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_ids_out_of_range_are_no_adapter(on_gpu, tokens, dtype):
    operands = make(tokens, dtype)
    operands.ids[:, 0] = torch.tensor([6, -2, 2**30, -(2**31)], device="cuda", dtype=torch.int32).repeat(10)[:tokens]
    tame = operands._replace(ids=torch.where((operands.ids < 0) | (operands.ids > 5), -1, operands.ids))
    assert torch.equal(fm.lora_linear(*operands), fm.lora_linear(*tame))


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_a_graph_replays_with_other_tokens(on_gpu, tokens):
    """Routing and application are captured together; nothing waits for the device, nothing depends on the first values."""
    operands, router = make(tokens), torch.randn(6, 64, device="cuda").bfloat16()

    def step(x):
        ids, gates = fm.route_topk(x, router, 2)
        return fm.lora_linear(*operands._replace(x=x, ids=ids, gates=gates))

    x = operands.x.clone()
    step(x)  # compiled, and the allocator warm
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype))
        graph.replay()
        assert torch.equal(y, step(x))


def test_no_call_waits_for_the_device(on_gpu):
    given = [
        (make(tokens, dtype), torch.randn(6, 64, device="cuda", dtype=dtype)) for tokens in (1, 40) for dtype in (*HALVES, torch.float32)
    ]
    for attempt in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            for operands, router in given:
                leaf = operands.x.detach().requires_grad_()
                ids, gates = fm.route_topk(leaf, router, 2)
                fm.lora_linear(*operands._replace(x=leaf, ids=ids, gates=gates)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients(on_gpu):
    small = ops_kit.make(3, 2, 4, 3, 5, 7, torch.float64, popularity="sparse")
    small = small._replace(a=small.a.nan_to_num(), b=small.b.nan_to_num())
    leaves = tuple(t.cuda() if name == "ids" else t.cuda().requires_grad_() for name, t in small._asdict().items())
    assert torch.autograd.gradcheck(fm.lora_linear, leaves)


def test_rates_of_a_gpu():
    rates = cost.measure_rates("cuda")
    assert 1e11 < rates.bytes_per_second < 1e13 and 1e13 < rates.flops_per_second < 1e16 and 1e-7 < rates.launch_seconds < 1e-4
    weights = {"w": torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")}
    found = fm.crossover(weights, fm.AdapterBank.random({"w": weights["w"] + 1}, 4, 16), 2)
    assert found.rates is rates and math.isfinite(found.tokens) and found.tokens > 1
