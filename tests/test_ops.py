"""`lora_linear` and `route_topk` against float64 truth, by every implementation. Operators and gradients: tests/test_ops_operator.py."""

import math

import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import reference
from fusedmerge.ops import torch_linear
from tests import ops_kit

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
LENGTHS = (1, 3, 16, 17, 40)  # up to 16 tokens, and more


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("jit", "aot")]


@pytest.fixture(params=["cpu", "sim", *ON_GPU])
def where(request, monkeypatch):
    """Every backend, chosen as a user chooses it."""
    monkeypatch.setenv("FUSEDMERGE_BACKEND", request.param)
    if request.param == "sim":
        monkeypatch.setenv("FUSEDMERGE_SIM_LIB", request.getfixturevalue("sim_library"))
    return request.param


@pytest.fixture
def apply(where):
    """`lora_linear` as each backend runs it: y on the CPU from operands on the CPU."""
    if where in ("cpu", "sim"):
        return lambda operands: fm.lora_linear(*operands)

    def on_gpu(operands):
        if operands.x.dtype not in HALVES:  # torch, which reads every adapter there
            operands = operands._replace(a=operands.a.nan_to_num(), b=operands.b.nan_to_num())
        return fm.lora_linear(*(t if t is None else t.cuda() for t in operands)).cpu()

    return on_gpu


@pytest.fixture
def choose(where):
    """`route_topk` as each backend runs it, from and to the CPU."""
    device = "cpu" if where in ("cpu", "sim") else "cuda"
    return lambda x, router, *options: [found.cpu() for found in fm.route_topk(x.to(device), router.to(device), *options)]


def check(apply, operands):
    assert ops_kit.excess(apply(operands), operands) <= 1


# ---- lora_linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("popularity", ops_kit.POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_within_the_bound(apply, tokens, dtype, popularity):
    check(apply, ops_kit.make(tokens, 2, 5, 7, 67, 33, dtype, popularity=popularity))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 8, 8, 16, 64, 48),  # every adapter at once
        (5, 3, 2, 512, 31, 9),  # a rank above both sides
        (16, 1, 64, 4, 129, 257),
        (2, 2, 4, 8, 11008, 5),
        (33, 4, 3, 5, 1, 130),
        (100, 2, 16, 3, 24, 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(apply, shape, dtype):
    for same_sign in (False, True):
        check(apply, ops_kit.make(*shape, dtype, same_sign=same_sign, scaling=not same_sign, bias=same_sign))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2, 3), (4, 1, 5)])
def test_batch_dimensions(apply, batch, dtype):
    flat = ops_kit.make(math.prod(batch), dtype=dtype)
    shaped = flat._replace(x=flat.x.reshape(*batch, -1), ids=flat.ids.reshape(*batch, -1), gates=flat.gates.reshape(*batch, -1))
    check(apply, shaped)
    assert torch.equal(apply(shaped).reshape(flat.x.shape[0], -1), apply(flat))


@pytest.mark.parametrize("empty", ["tokens", "k", "num_adapters", "r", "n_in", "n_out"])
def test_nothing_of_something(apply, empty):
    sizes = {"tokens": 3, "k": 2, "num_adapters": 4, "r": 3, "n_in": 6, "n_out": 5} | {empty: 0}
    operands = ops_kit.make(**sizes, popularity="none" if empty == "num_adapters" else "uniform")
    check(apply, operands)
    assert torch.equal(apply(operands), torch.nn.functional.linear(operands.x, operands.weight, operands.bias))


def spread(tensor):
    """The same values with gaps between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan") if tensor.is_floating_point() else 99, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def turned(tensor):
    """The same values, the last dimension outermost."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("change", [spread, turned])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_any_strides(apply, tokens, dtype, change):
    operands = ops_kit.make(tokens, dtype=dtype)
    strided = type(operands)(*map(change, operands))
    assert strided.a.stride() != operands.a.stride()
    check(apply, strided)


@pytest.mark.parametrize("tokens", [3, 20])
def test_float32_factors_stay_float32_beside_16_bit_weights(tokens):
    narrow = ops_kit.make(tokens, num_adapters=2, n_in=64, popularity="identical")
    rng = torch.Generator().manual_seed(0)
    wide = narrow._replace(
        a=torch.randn(narrow.a.shape, generator=rng), b=torch.randn(narrow.b.shape, generator=rng), gates=narrow.gates + 3.0
    )
    assert ops_kit.excess(fm.lora_linear(*wide), wide) <= 1
    rounded = wide._replace(a=wide.a.bfloat16(), b=wide.b.bfloat16())
    assert ops_kit.excess(fm.lora_linear(*rounded), wide) > 1


@pytest.mark.parametrize("dtype", HALVES)
def test_gates_and_scaling_of_any_float_dtype(apply, dtype):
    operands = ops_kit.make(4, dtype=dtype)
    for kind in DTYPES:
        check(apply, operands._replace(gates=operands.gates.to(kind), scaling=operands.scaling.to(kind)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize("tokens", [3, 20])
def test_ids_of_any_signed_integer_dtype(apply, tokens, dtype):
    operands = ops_kit.make(tokens)
    assert torch.equal(apply(operands._replace(ids=operands.ids.to(dtype))), apply(operands))


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_an_adapter_have_the_backbones_bits(tokens, dtype):
    operands = ops_kit.make(tokens, dtype=dtype, popularity="sparse")
    operands.gates[1] = 0.0  # a gate of 0 is no adapter either
    idle = (operands.ids < 0).all(dim=1) | (operands.gates == 0).all(dim=1)
    assert idle.any() and not idle.all()
    backbone = torch.nn.functional.linear(operands.x, operands.weight, operands.bias)
    assert torch.equal(fm.lora_linear(*operands)[idle], backbone[idle])


@pytest.mark.parametrize("tokens", [1, 16])
def test_values_near_the_ends_of_float16(apply, tokens):
    """Results among the subnormal numbers, and near the largest ones, are still rounded once; an overflow is inf, not NaN."""
    operands = ops_kit.make(tokens, n_in=64, dtype=torch.float16, popularity="distinct", bias=False)
    small = operands._replace(x=operands.x * 2.0**-12, weight=operands.weight * 2.0**-2)
    check(apply, small)
    large = operands._replace(x=operands.x * 512, weight=operands.weight * 32)
    assert 8192 < apply(large).abs().max() < torch.inf
    check(apply, large)
    y = apply(large._replace(weight=large.weight * 32))
    assert torch.isinf(y).any() and not torch.isnan(y).any()


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_coefficient_beyond_float32_is_infinite(tokens):
    operands = ops_kit.make(tokens, dtype=torch.float32, popularity="identical")
    y = fm.lora_linear(*operands._replace(gates=operands.gates.sign() * 3e38, scaling=operands.scaling + 9))
    assert not torch.isfinite(y).any()


@pytest.mark.parametrize("where", ["sim", *ON_GPU], indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_decode_steps_bits_do_not_depend_on_the_other_tokens(apply, dtype):
    operands = ops_kit.make(16, r=20, n_in=300, dtype=dtype)
    y = apply(operands)
    for chosen in ([0], [15], [3, 4, 5], list(range(9)), list(range(15, -1, -1))):
        some = operands._replace(**{name: getattr(operands, name)[chosen] for name in ("x", "ids", "gates")})
        assert torch.equal(apply(some), y[chosen])


@pytest.mark.parametrize("tokens", [2, 20])
def test_what_is_not_finite_stays_with_its_token(apply, tokens):
    operands = ops_kit.make(tokens)
    operands.x[1] = float("nan")
    y = apply(operands)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[0]).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_reduced_float32_precision_does_not_spoil_16_bit_results(dtype):
    """A program may allow bfloat16 inside float32 products; then the factors' products would lose their bits."""
    operands = ops_kit.make(16, r=16, n_in=512, n_out=256, dtype=dtype, popularity="identical")
    router = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    before = fm.lora_linear(*operands), *fm.route_topk(operands.x.float(), router, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        after = fm.lora_linear(*operands), *fm.route_topk(operands.x.float(), router, 2)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("popularity", ops_kit.POPULARITIES)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_adapters_at_once_is_the_same_operation(tokens, dtype, popularity):
    """What runs where ids may not be read; ids outside [-1, N) are no adapter there."""
    operands = ops_kit.make(tokens, dtype=dtype, popularity=popularity)
    operands = operands._replace(a=operands.a.nan_to_num(), b=operands.b.nan_to_num())
    assert ops_kit.excess(torch_linear.all_adapters(operands), operands) <= 1
    wild = operands.ids.clone()
    wild[wild < 0] = 77
    wild[:, 0] = -5
    tame = operands._replace(ids=torch.where(wild > 3, -1, wild).clamp_min(-1))
    assert torch.equal(torch_linear.all_adapters(operands._replace(ids=wild)), torch_linear.all_adapters(tame))


# ---- route_topk ------------------------------------------------------------------------------------------------------


def route_truth(x, router, k, normalize):
    """ids and gates in float64 NumPy."""
    logits = reference.to_float64(x) @ reference.to_float64(router).T
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    over_all = np.exp(logits - logits.max(axis=-1, keepdims=True))
    over_all /= over_all.sum(axis=-1, keepdims=True)
    gates = np.take_along_axis(over_all, ids, axis=-1)
    return ids, gates / gates.sum(axis=-1, keepdims=True) if normalize and k > 1 else gates


@pytest.mark.parametrize("router_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_adapters", "k"), [(1, 1), (8, 1), (8, 2), (8, 8), (67, 5)])
def test_routing(choose, num_adapters, k, normalize, dtype, router_dtype):
    rng = torch.Generator().manual_seed(num_adapters)
    x = torch.randn(3, 7, 96, generator=rng, dtype=torch.float64).to(dtype)
    router = (torch.randn(num_adapters, 96, generator=rng, dtype=torch.float64) * 0.2).to(router_dtype or dtype)
    ids, gates = choose(x, router, k, normalize)
    expected_ids, expected_gates = route_truth(x, router, k, normalize)
    assert ids.dtype == torch.int32 and gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ids.shape == gates.shape == (3, 7, k)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)  # in float32 no two of these logits are too near to tell
    np.testing.assert_allclose(gates.numpy(), expected_gates, rtol=1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_index(choose, dtype):
    router = torch.tensor([[1.0], [3.0], [3.0], [2.0], [3.0], [2.0]], dtype=dtype)
    x = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    for normalize in (True, False):
        ids, _ = choose(x, router, 4, normalize)
        assert ids.tolist() == [[1, 2, 4, 3], [0, 3, 5, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_order_is_that_of_the_logits_where_softmax_cannot_tell(choose, dtype):
    """exp(-200) and exp(-300) are both 0 in float32."""
    ids, gates = choose(torch.ones(1, dtype=dtype), torch.tensor([[0.0], [-300.0], [-200.0]], dtype=dtype), 3, False)
    assert ids.tolist() == [0, 2, 1] and gates.tolist() == [1.0, 0.0, 0.0]


def test_logits_of_16_bit_operands_are_not_rounded_to_16_bits(choose):
    x, router = torch.ones(2, dtype=torch.bfloat16), torch.tensor([[256.0, 0.0], [256.0, 0.5]], dtype=torch.bfloat16)
    ids, gates = choose(x, router, 2)
    assert ids.tolist() == [1, 0] and abs(gates[0].item() - 1 / (1 + math.exp(-0.5))) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_is_never_chosen(choose, normalize, dtype):
    """A token that is NaN gets no adapter, so that a whole batch is not refused for it: its y is NaN anyway."""
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [2.0, 1.0]], dtype=dtype)
    ids, gates = choose(x, torch.eye(2, dtype=dtype), 2, normalize)
    assert ids.tolist() == [[1, 0], [-1, -1], [0, 1]] and gates[1].tolist() == [0.0, 0.0]
    assert torch.equal(gates[0], gates[2]) and abs(gates[0].sum().item() - 1) < 1e-6
    ids, gates = choose(torch.ones(1, 2, dtype=dtype), torch.tensor([[torch.nan, 0.0], [1.0, 1.0]], dtype=dtype), 2, True)
    assert ids.tolist() == [[1, -1]] and gates.tolist() == [[1.0, 0.0]]


def test_nan_spoils_no_other_gradient():
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]], requires_grad=True)
    _, gates = fm.route_topk(x, torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]]), 2)
    gates[:, 0].sum().backward()
    assert torch.isfinite(x.grad[0]).all() and x.grad[0].abs().max() > 0


def test_routing_of_nothing():
    ids, gates = fm.route_topk(torch.zeros(0, 4), torch.ones(3, 4), 2)
    assert ids.shape == gates.shape == (0, 2)
    ids, gates = fm.route_topk(torch.zeros(2, 0), torch.ones(3, 0), 2)
    assert ids.tolist() == [[0, 1]] * 2 and gates.tolist() == [[0.5, 0.5]] * 2
