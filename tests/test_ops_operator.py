"""The operators behind `lora_linear` and `route_topk`: torch.library's own checks, torch.compile, gradients, autocast, checkpointing."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fusedmerge as fm
from fusedmerge import reference
from fusedmerge.ops import torch_linear
from tests import kit, ops_kit

NAMES = ("x", "weight", "a", "b", "gates", "scaling", "bias")  # what has a gradient


def differentiable(operands, names=NAMES):
    return operands._replace(**{n: getattr(operands, n).detach().requires_grad_() for n in names if getattr(operands, n) is not None})


def make(tokens=3, dtype=torch.float64, **options):
    operands = ops_kit.make(tokens, 2, 4, 3, 5, 7, dtype, **options)
    return operands._replace(a=operands.a.nan_to_num(), b=operands.b.nan_to_num())  # numeric gradients perturb unused adapters too


# ---- torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    kit.fast_first(
        [
            {},
            {"tokens": 2, "scaling": False, "bias": False, "dtype": torch.bfloat16},
            {"tokens": 20, "popularity": "sparse"},
            {"tokens": 0},
            {"tokens": 3, "dtype": torch.float32, "popularity": "duplicate"},
        ],
        2,
    ),
)
@pytest.mark.parametrize("batched", kit.fast_first([True, False]))
def test_opcheck_of_lora_linear(options, batched):
    operands = make(**options)
    if batched:
        operands = operands._replace(x=operands.x[:, None], ids=operands.ids[:, None], gates=operands.gates[:, None])
    for given in (operands, differentiable(operands), differentiable(operands, ["x"])):
        assert set(opcheck(torch.ops.fusedmerge.lora_linear.default, tuple(given)).values()) == {"SUCCESS"}


def test_opcheck_of_the_backward_operator():
    operands, grad = make(20, torch.float32), torch.ones(20, 7)
    for needs in ([True] * 5, [True, False, True, False, False], [False] * 5):
        opcheck(torch.ops.fusedmerge.lora_linear_backward.default, (grad, *operands, needs))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((5,), (3, 5), (0, 5)))])
def test_opcheck_of_route_topk(shape, normalize):
    for dtype, grad in ((torch.float32, True), (torch.bfloat16, False)):
        x, router = torch.randn(shape, dtype=dtype, requires_grad=grad), torch.randn(4, 5, dtype=dtype, requires_grad=grad)
        assert set(opcheck(torch.ops.fusedmerge.route_topk.default, (x, router, 2, normalize)).values()) == {"SUCCESS"}


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def layer(x, router, weight, a, b, scaling):
    ids, gates = fm.route_topk(x, router, 2)
    return fm.lora_linear(x, weight, a, b, ids, gates, scaling).tanh()


def layer_operands(tokens, dtype=torch.float32):
    made = ops_kit.make(tokens, 2, 5, 3, 8, 6, dtype, popularity="distinct")
    generator = torch.Generator().manual_seed(tokens)
    router = torch.randn(5, 8, generator=generator).to(dtype)
    return [t.nan_to_num().requires_grad_() for t in (made.x, router, made.weight, made.a, made.b, made.scaling)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break(backend):
    torch._dynamo.reset()
    operators, graphs = [], []

    def count(graph, example_inputs):
        graphs.append(graph)
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for tokens in (4, 6, 40, 17):  # the second length makes it dynamic
        operands = layer_operands(tokens)
        y, expected = compiled(*operands), layer(*operands)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        for got, wanted in zip(torch.autograd.grad(y.sum(), operands), torch.autograd.grad(expected.sum(), operands), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
    assert any("lora_linear" in name for name in operators) and any("route_topk" in name for name in operators)


@pytest.mark.slow
def test_compiled_first_thing_in_a_process():
    """The package is lazy: the operators must be found although nothing has used them yet."""
    code = (
        "import torch, fusedmerge as fm\n"
        "f = torch.compile(lambda x, r: fm.route_topk(x, r, 2), fullgraph=True, backend='eager')\n"
        "print(f(torch.ones(1, 2), torch.eye(2))[1].tolist())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[[0.5, 0.5]]\n"


def test_values_are_checked_in_a_compiled_graph_too():
    torch._dynamo.reset()
    operands = make(3, torch.float32)
    compiled = torch.compile(fm.lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands), fm.lora_linear(*operands))
    operands.ids[1, 1] = 4
    with pytest.raises(fm.FusedMergeError, match=r"ids\[1, 1\]: expected -1 \(no adapter\) or 0 to 3, got 4"):
        compiled(*operands)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"popularity": popularity} for popularity in ops_kit.POPULARITIES),
        {"tokens": 1},
        {"tokens": 18, "popularity": "sparse"},
        {"scaling": False, "bias": False},
    ],
)
def test_gradcheck(options):
    assert torch.autograd.gradcheck(fm.lora_linear, tuple(differentiable(make(**options))))


def test_a_gate_of_0_has_a_gradient():
    operands = make(3)
    operands.gates[:, 0] = 0.0
    assert torch.autograd.gradcheck(fm.lora_linear, tuple(differentiable(operands)))
    given = differentiable(operands, ["gates"])
    fm.lora_linear(*given).sum().backward()
    assert given.gates.grad[:, 0].abs().min() > 0


def test_gradcheck_twice(monkeypatch):
    monkeypatch.setattr(torch_linear, "by_expert_backward", lambda *_: pytest.fail("an operator without a derivative"))
    assert torch.autograd.gradgradcheck(fm.lora_linear, tuple(differentiable(make(2))))


@pytest.mark.parametrize("popularity", ops_kit.POPULARITIES)
def test_both_backward_passes_agree(popularity):
    """The one that reads ids, and the one for devices; ids outside [-1, N) are no adapter there."""
    operands = make(20, popularity=popularity)
    grad = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wild = operands._replace(ids=torch.where(operands.ids < 0, 4, operands.ids))
    for needs in ([True] * 5, [False] * 5):
        expected = torch_linear.by_expert_backward(grad, operands, needs)
        for got, wanted in zip(torch_linear.all_adapters_backward(grad, wild, needs), expected, strict=True):
            assert (got is None) == (wanted is None)
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradcheck_of_route_topk(k, normalize):
    generator = torch.Generator().manual_seed(k)
    x, router = (torch.randn(*shape, 5, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4,)))

    def gates(x, router):
        return fm.route_topk(x, router, k, normalize)[1]

    assert torch.autograd.gradcheck(gates, (x, router))
    assert torch.autograd.gradgradcheck(gates, (x, router))
    grads = torch.autograd.grad((gates(x, router) * torch.arange(1.0, k + 1)).sum(), (x, router))
    assert all(grad.abs().max() > 1e-3 for grad in grads)  # for k = 1 as well


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_in_other_dtypes(tokens, dtype):
    """Each gradient against float64's on the same values: 16-bit results are rounded twice at most, where W x takes part in them."""
    narrow = differentiable(ops_kit.make(tokens, 2, 4, 3, 33, 17, dtype, popularity="distinct"))
    wide = type(narrow)(*(t if t is None or name == "ids" else t.detach().double() for name, t in narrow._asdict().items()))
    wide = differentiable(wide)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(tokens, 17, generator=generator).to(dtype)
    got = torch.autograd.grad(fm.lora_linear(*narrow), [getattr(narrow, n) for n in NAMES], grad)
    expected = torch.autograd.grad(fm.lora_linear(*wide), [getattr(wide, n) for n in NAMES], grad.double())
    for name, result, truth in zip(NAMES, got, expected, strict=True):
        assert result.dtype == getattr(narrow, name).dtype
        spacing = 2.0 ** -{torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}[result.dtype]
        error = (result.double() - truth).abs()
        assert torch.all(error <= spacing * (truth.abs() + 0.5 * truth.abs().max())), (name, float(error.max()))


@pytest.mark.parametrize("tokens", [3, 40])
def test_only_what_is_needed_is_computed(tokens, monkeypatch):
    asked = []
    backward = torch_linear.by_expert_backward
    monkeypatch.setattr(torch_linear, "by_expert_backward", lambda *args: asked.append(list(args[2])) or backward(*args))
    operands = make(tokens, torch.float32)
    fm.lora_linear(*differentiable(operands)).sum().backward()
    assert asked.pop() == [True] * 5
    for index, name in enumerate(("x", "a", "b", "gates", "scaling")):
        some = differentiable(operands, [name])
        fm.lora_linear(*some).sum().backward()
        assert asked.pop() == [index == place for place in range(5)]
        assert [n for n in NAMES if getattr(some, n).grad is not None] == [name]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 40])
def test_gates_and_scaling_keep_their_dtypes(tokens, kind):
    plain = differentiable(make(tokens, torch.float32), ["gates", "scaling"])
    other = plain._replace(gates=plain.gates.detach().to(kind), scaling=plain.scaling.detach().to(kind))
    other = differentiable(other, ["gates", "scaling"])
    for operands in (plain, other):
        fm.lora_linear(*operands).sum().backward()
    for name in ("gates", "scaling"):
        got, expected = getattr(other, name).grad, getattr(plain, name).grad
        assert got.dtype == kind
        torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("empty", ["tokens", "k", "r", "n_in", "n_out"])
def test_gradients_of_nothing(empty):
    sizes = {"tokens": 3, "k": 2, "num_adapters": 4, "r": 3, "n_in": 6, "n_out": 5} | {empty: 0}
    operands = differentiable(ops_kit.make(**sizes, dtype=torch.float32, popularity="identical"))
    fm.lora_linear(*operands).sum().backward()
    for name in NAMES:
        assert getattr(operands, name).grad.shape == getattr(operands, name).shape


def test_unused_adapters_get_a_gradient_of_zero():
    operands = differentiable(ops_kit.make(2, 1, 4, dtype=torch.float32, popularity="identical"), ["a", "b"])
    assert torch.isnan(operands.a[1:]).all()
    fm.lora_linear(*operands).sum().backward()
    for factor in (operands.a, operands.b):
        assert factor.grad[0].abs().max() > 0 and not factor.grad[1:].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    operands = layer_operands(6)
    plain = torch.autograd.grad(layer(*operands).sum(), operands)
    again = checkpoint(layer, *operands, use_reentrant=reentrant)
    again.sum().backward()
    assert all(torch.equal(grad, operand.grad) for grad, operand in zip(plain, operands, strict=True))


def test_backward_after_an_in_place_change_raises_torchs_own_error():
    operands = differentiable(make(3, torch.float32))
    y = fm.lora_linear(*operands)
    with torch.no_grad():
        operands.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_as_linear_does():
    operands = make(3, torch.float32, scaling=True)
    halves = operands._replace(**{n: getattr(operands, n).bfloat16() for n in ("x", "weight", "a", "b", "bias")})
    mixed = differentiable(operands._replace(x=operands.x.bfloat16()), ["a", "b", "gates"])  # as a layer gets it inside a model
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(operands.x, operands.weight).dtype == torch.bfloat16
        y = fm.lora_linear(*operands)
        z = fm.lora_linear(*mixed)
        ids, gates = fm.route_topk(operands.x, operands.weight, 2)
    assert torch.equal(y, fm.lora_linear(*halves)) and torch.equal(z, y)
    z.sum().backward()
    assert mixed.a.grad.dtype == torch.float32
    for got, wanted in zip((ids, gates), fm.route_topk(operands.x, operands.weight, 2), strict=True):
        assert torch.equal(got, wanted)


def test_float64_is_left_alone_by_autocast():
    operands = make(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops_kit.excess(fm.lora_linear(*operands), operands) <= 1


def test_a_trained_router_learns_to_choose():
    """The whole chain has a gradient: a router, started at random, moves each kind of token to the adapter that serves it."""
    torch.manual_seed(0)
    x = torch.eye(2).repeat(8, 1)
    a, b = torch.eye(2).reshape(2, 1, 2), torch.eye(2).reshape(2, 2, 1)  # adapter n passes feature n on
    router = (torch.randn(2, 2) * 0.1).requires_grad_()
    optimizer = torch.optim.SGD([router], 1.0)
    for _ in range(200):
        ids, gates = fm.route_topk(x, router, 2)
        loss = (fm.lora_linear(x, torch.zeros(2, 2), a, b, ids, gates) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, gates = fm.route_topk(x, router, 1)
    assert ids.flatten().tolist() == [0, 1] * 8 and gates.min() > 0.9
    assert reference.to_float64(loss) < 0.01
