"""Which implementation `lora_linear` and `route_topk` choose, and what they hand to the kernels.

The kernels are stood in for here by torch. What they compute: tests/test_ops.py, with the backend `sim`.
"""

import logging

import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, errors
from fusedmerge.backend.cpu import exact_products
from fusedmerge.ops import group_once, library, torch_linear, torch_route
from fusedmerge.ops.arguments import Operands
from tests import ops_kit

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the kernels' entry points, as (name, arguments); every backend can be used."""
    found = []

    def decode_linear(*arguments):
        found.append(("decode_linear", arguments))
        _, x, weight, a, b, ids, gates, scaling, bias = arguments
        return torch_linear.by_expert(Operands(x, weight, a, b, ids, gates, scaling, bias))

    def add_adapters(*arguments):
        found.append(("add_adapters", arguments))
        _, y, x, a, b, ids, gates, scaling, _ = arguments
        y += torch_linear.by_expert(Operands(x, torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype), a, b, ids, gates, scaling))

    def route(*arguments):
        found.append(("route", arguments))
        return torch_route.route(*arguments[1:])

    for name, stand_in in (("decode_linear", decode_linear), ("add_adapters", add_adapters), ("kernel_route", route)):
        monkeypatch.setattr(library, name, stand_in)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    monkeypatch.setattr(backend, "choose", lambda device, operation: "sim")
    library._backend.cache_clear()
    yield found
    library._backend.cache_clear()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tokens", "entry"), [(1, "decode_linear"), (16, "decode_linear"), (17, "add_adapters"), (64, "add_adapters")])
def test_the_number_of_tokens_chooses_the_kernel(calls, tokens, entry, dtype):
    operands = ops_kit.make(tokens, dtype=dtype)
    y = fm.lora_linear(*operands)
    assert [name for name, _ in calls] == [entry] and calls[0][1][0] == "sim"
    truth = ops_kit.truth(operands)
    assert abs(y.double().numpy() - truth).max() < 0.05 * abs(truth).max()


def test_tokens_are_counted_over_all_batch_dimensions(calls):
    operands = ops_kit.make(18)
    shaped = {name: getattr(operands, name).reshape(3, 6, -1) for name in ("x", "ids", "gates")}
    assert fm.lora_linear(*operands._replace(**shaped)).shape == (3, 6, 24)
    assert calls[0][0] == "add_adapters" and calls[0][1][1].shape == (18, 24)


@pytest.mark.parametrize("tokens", [3, 40])
def test_kernels_get_what_they_promise_to_read(calls, tokens):
    """Columns side by side, ids int32, gates and scaling float32, and no copy of what is so already."""
    operands = ops_kit.make(tokens)
    fm.lora_linear(*operands)
    given = {tensor.data_ptr() for tensor in calls.pop()[1] if isinstance(tensor, torch.Tensor)}
    assert {
        operands.x.data_ptr(),
        operands.a.data_ptr(),
        operands.b.data_ptr(),
        operands.ids.data_ptr(),
        operands.gates.data_ptr(),
    } <= given
    turned = [tensor.movedim(-1, 0).contiguous().movedim(0, -1) for tensor in operands]
    changed = Operands(*turned)._replace(ids=turned[4].long(), gates=turned[5].double(), scaling=turned[6].bfloat16())
    changed = changed._replace(bias=torch.stack([operands.bias, operands.bias], dim=1)[:, 0])
    fm.lora_linear(*changed)
    tensors = [tensor for tensor in calls.pop()[1] if isinstance(tensor, torch.Tensor)]
    assert all(tensor.stride(-1) == 1 for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16, torch.int32, torch.float32}
    assert [tensor.dtype for tensor in tensors if tensor.dtype != torch.bfloat16] == [torch.int32, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "change",
    [
        lambda o: Operands(*(tensor if name == "ids" else tensor.float() for name, tensor in o._asdict().items())),
        lambda o: o._replace(a=o.a.float(), b=o.b.float()),
        lambda o: o._replace(ids=o.ids[:, :1].repeat(1, 33), gates=o.gates[:, :1].repeat(1, 33)),
        lambda o: o._replace(x=o.x[:0], ids=o.ids[:0], gates=o.gates[:0]),
        lambda o: o._replace(ids=o.ids[:, :0], gates=o.gates[:, :0]),
        lambda o: o._replace(a=o.a[:, :0], b=o.b[..., :0]),
        lambda o: o._replace(x=o.x[:, :0], weight=o.weight[:, :0], a=o.a[..., :0]),
        lambda o: o._replace(weight=o.weight[:0], b=o.b[:, :0], bias=o.bias[:0]),
    ],
    ids=["float32", "float32 factors", "33 slots", "no token", "no slot", "rank 0", "no column", "no row"],
)
@pytest.mark.parametrize("tokens", [2, 20])
def test_what_the_kernels_do_not_take_goes_to_torch(calls, tokens, change):
    operands = change(ops_kit.make(tokens))
    assert ops_kit.excess(fm.lora_linear(*operands), operands) <= 1
    assert not calls


def test_tokens_are_grouped_once_where_the_caller_says_so(monkeypatch, sim_library):
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    made = []
    group = library.group_tokens
    monkeypatch.setattr(library, "group_tokens", lambda *arguments: made.append(arguments[3]) or group(*arguments))
    first, second = ops_kit.make(20, seed=1, popularity="identical"), ops_kit.make(20, seed=2, popularity="zipf")
    layers = [first, first._replace(x=-first.x, ids=first.ids.reshape(20, 2)), second, first]
    expected = [fm.lora_linear(*operands) for operands in layers]
    assert not made
    with group_once():
        assert all(torch.equal(fm.lora_linear(*operands), y) for operands, y in zip(layers, expected, strict=True))
        assert made == [4, 4]
        fm.lora_linear(*first._replace(a=first.a[:3], b=first.b[:3], scaling=first.scaling[:3]))
        fm.lora_linear(*ops_kit.make(3))
        assert made == [4, 4, 3]
    changed = first._replace(ids=first.ids.flip(1))
    first.ids.copy_(changed.ids)  # what was kept has ended
    assert torch.equal(fm.lora_linear(*first), fm.lora_linear(*changed)) and len(made) == 3


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_by_the_kernel(calls, normalize):
    x, router = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    ids, gates = fm.route_topk(x, router, 2, normalize)
    name, (where, rows, _, k, over_top) = calls.pop()
    assert (name, where, rows.shape, k, over_top) == ("route", "sim", (6, 8), 2, normalize)
    assert ids.shape == gates.shape == (2, 3, 2) and ids.dtype == torch.int32
    fm.route_topk(x, router.float(), 2)
    assert calls.pop()[1][2].dtype == torch.float32
    fm.route_topk(x, router.half(), 2)
    fm.route_topk(x.float(), router.float(), 2)
    fm.route_topk(x[:0], router, 2)
    fm.route_topk(x, torch.zeros(4097, 8, dtype=torch.bfloat16), 2)
    fm.route_topk(x, torch.zeros(40, 8, dtype=torch.bfloat16), 33)
    assert not calls


@pytest.mark.parametrize("tokens", [2, 20])
def test_gradients_of_what_a_kernel_computed(calls, tokens):
    operands = ops_kit.make(tokens, popularity="distinct")
    expected = operands._replace(x=operands.x.clone().requires_grad_(), gates=operands.gates.clone().requires_grad_())
    given = operands._replace(x=operands.x.clone().requires_grad_(), gates=operands.gates.clone().requires_grad_())
    fm.lora_linear(*given).float().square().sum().backward()
    assert len(calls) == 1
    dense = torch_linear.all_adapters(expected._replace(a=expected.a.nan_to_num(), b=expected.b.nan_to_num()))
    dense.float().square().sum().backward()
    for name in ("x", "gates"):
        got, wanted = getattr(given, name).grad.float(), getattr(expected, name).grad.float()
        assert (got - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_without_the_variable_cpu_tensors_go_to_the_extension_or_torch(calls, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("FUSEDMERGE_BACKEND", raising=False)
    library._backend.cache_clear()
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert library.implementation("lora_linear", 4, 2, half, half) == "native"
    assert library.implementation("lora_linear", 4, 2, half.float(), half.float()) == "torch"
    monkeypatch.setattr(backend, "extension", lambda: None)
    assert library.implementation("lora_linear", 4, 2, half, half) == "torch"


def test_a_backend_that_was_asked_for_and_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", "/nowhere/sim.so")
    with pytest.raises(errors.BackendError, match="lora_linear: .*sim: /nowhere/sim.so is missing"):
        fm.lora_linear(*ops_kit.make(2))
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "gpu")
    with pytest.raises(errors.InvalidValueError, match="FUSEDMERGE_BACKEND: expected one of cpu, sim, jit, aot, got gpu"):
        fm.lora_linear(*ops_kit.make(2))


def test_a_gpu_without_a_backend_runs_torch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("FUSEDMERGE_BACKEND", raising=False)
    library._backend.cache_clear()
    usable = fm.backends()
    if usable["jit"] or usable["aot"]:
        pytest.skip("there is one here")
    with caplog.at_level(logging.WARNING):
        assert [library._backend("route_topk", "cuda", "", "") for _ in range(2)] == ["cpu", "cpu"]
    library._backend.cache_clear()
    assert len(caplog.records) == 1 and "route_topk runs in torch on cuda" in caplog.text and "aot: " in caplog.text


def test_threads_that_overlap_leave_the_precision_as_it_was():
    """The first to begin is not the last to end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        set_by_caller = torch.backends.mkldnn.matmul.fp32_precision
        first, second = exact_products(), exact_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" != set_by_caller
        second.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == set_by_caller
    finally:
        torch.set_float32_matmul_precision(before)
