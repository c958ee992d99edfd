"""What `lora_linear` and `route_topk` accept and refuse: errors one by one, arrays of other libraries."""

import types

import numpy as np
import pytest
import torch

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.weights import collect
from tests import ops_kit

GOOD = ops_kit.make(3, 2, 4, 3, 6, 5, torch.float32)


class Plain:
    """An array that is known by DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def floats(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor or an array, got list"),
        ({"weight": None}, TypeError, "weight: expected a tensor or an array, got NoneType"),
        ({"a": "a"}, TypeError, "a: expected a tensor or an array, got str"),
        ({"ids": 1}, TypeError, "ids: expected a tensor or an array, got int"),
        ({"gates": 0.5}, TypeError, "gates: expected a tensor or an array, got float"),
        ({"scaling": 2.0}, TypeError, "scaling: expected a tensor or an array, got float"),
        ({"bias": True}, TypeError, "bias: expected a tensor or an array, got bool"),
        ({"x": floats(3, 6, dtype=torch.int32)}, TypeError, "x: expected bfloat16, float16, float32 or float64, got torch.int32"),
        ({"x": floats(3, 6, dtype=torch.complex64)}, TypeError, "x: expected bfloat16, .*, got torch.complex64"),
        ({"x": floats(3, 6).to(torch.float8_e4m3fn)}, TypeError, "x: expected bfloat16, .*, got torch.float8_e4m3fn"),
        ({"weight": floats(5, 6, dtype=torch.bfloat16)}, TypeError, r"weight: expected x's dtype \(torch.float32\), got torch.bfloat16"),
        ({"bias": floats(5, dtype=torch.float64)}, TypeError, r"bias: expected x's dtype \(torch.float32\), got torch.float64"),
        ({"a": floats(4, 3, 6, dtype=torch.float16)}, TypeError, "a: expected torch.float32, got torch.float16"),
        ({"b": floats(4, 5, 3, dtype=torch.float64)}, TypeError, r"b: expected a's dtype \(torch.float32\), got torch.float64"),
        ({"ids": floats(3, 2)}, TypeError, r"ids: expected int32 \(or int8, int16, int64\), got torch.float32"),
        ({"ids": floats(3, 2, dtype=torch.bool)}, TypeError, "ids: expected int32 .*, got torch.bool"),
        ({"ids": floats(3, 2, dtype=torch.uint8)}, TypeError, "ids: expected int32 .*, got torch.uint8"),
        ({"gates": floats(3, 2, dtype=torch.int64)}, TypeError, "gates: expected bfloat16, .*, got torch.int64"),
        ({"scaling": floats(4, dtype=torch.int64)}, TypeError, "scaling: expected bfloat16, .*, got torch.int64"),
        ({"x": floats()}, ValueError, r"x: expected \[..., in\], got \[\]"),
        ({"x": floats(3, 7)}, ValueError, r"weight: expected \[out, 7\], got \[5, 6\]"),
        ({"weight": floats(6)}, ValueError, r"weight: expected \[out, 6\], got \[6\]"),
        ({"a": floats(3, 6)}, ValueError, r"a: expected \[N, r, 6\], got \[3, 6\]"),
        ({"a": floats(4, 3, 5)}, ValueError, r"a: expected \[N, r, 6\], got \[4, 3, 5\]"),
        ({"b": floats(4, 5, 2)}, ValueError, r"b: expected \[4, 5, 3\], got \[4, 5, 2\]"),
        ({"b": floats(3, 5, 3)}, ValueError, r"b: expected \[4, 5, 3\], got \[3, 5, 3\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"ids: expected \[3, k\], got \[2, 2\]"),
        ({"ids": torch.zeros(3, dtype=torch.int32)}, ValueError, r"ids: expected \[3, k\], got \[3\]"),
        ({"gates": floats(3, 1)}, ValueError, r"gates: expected \[3, 2\], got \[3, 1\]"),
        ({"scaling": floats(3)}, ValueError, r"scaling: expected \[4\], got \[3\]"),
        ({"bias": floats(6)}, ValueError, r"bias: expected \[5\], got \[6\]"),
        ({"a": floats(4, 3, 6).to_sparse()}, ValueError, "a: expected a dense tensor, got torch.sparse_coo"),
        ({"ids": torch.tensor([[0, 1], [4, 0], [0, 0]])}, ValueError, r"ids\[1, 0\]: expected -1 \(no adapter\) or 0 to 3, got 4"),
        ({"ids": torch.tensor([[0, 1], [2, -2], [9, 0]])}, ValueError, r"ids\[1, 1\]: expected -1 \(no adapter\) or 0 to 3, got -2"),
        ({"gates": torch.tensor([[1, 1], [1, 1], [torch.nan, 1]])}, ValueError, r"gates\[2, 0\]: expected a finite gate, got nan"),
        ({"gates": torch.tensor([[1, torch.inf], [1, 1], [1, 1]])}, ValueError, r"gates\[0, 1\]: expected a finite gate, got inf"),
    ],
)
def test_refused_by_lora_linear(changes, kind, message):
    with pytest.raises(errors.FusedMergeError, match=f"^lora_linear: {message}") as raised:
        fm.lora_linear(**(GOOD._asdict() | changes))
    assert isinstance(raised.value, kind)


@pytest.mark.parametrize("field", ["x", "weight", "a", "b", "ids", "gates", "scaling", "bias"])
def test_tensors_on_several_devices_are_refused(field):
    """x elsewhere is found at the first other tensor."""
    expected = r"weight: expected a tensor on x's device \(meta\), got cpu" if field == "x" else rf"{field}: expected .* \(cpu\), got meta"
    with pytest.raises(errors.DeviceError, match=expected):
        fm.lora_linear(**(GOOD._asdict() | {field: getattr(GOOD, field).to("meta")}))


def test_a_gate_in_an_empty_slot_must_be_finite_too():
    operands = GOOD._replace(ids=torch.full_like(GOOD.ids, -1), gates=torch.full_like(GOOD.gates, torch.nan))
    with pytest.raises(errors.InvalidValueError, match=r"gates\[0, 0\]"):
        fm.lora_linear(*operands)


def test_ids_where_there_is_no_adapter():
    operands = ops_kit.make(num_adapters=0, popularity="none")
    with pytest.raises(errors.InvalidValueError, match=r"ids\[0, 0\]: expected -1 \(there is no adapter\), got 0"):
        fm.lora_linear(*operands._replace(ids=torch.zeros_like(operands.ids)))


def test_gradients_where_there_is_no_adapter():
    operands = ops_kit.make(num_adapters=0, popularity="none")
    given = operands._replace(x=operands.x.clone().requires_grad_(), scaling=operands.scaling.clone().requires_grad_())
    fm.lora_linear(*given).float().sum().backward()
    assert given.scaling.grad.shape == (0,)
    assert torch.allclose(given.x.grad, operands.weight.sum(dim=0).expand_as(operands.x), atol=0.05, rtol=0.02)


def test_the_place_of_a_wrong_id_has_every_batch_dimension():
    operands = GOOD._replace(x=GOOD.x[None], ids=GOOD.ids[None].clone(), gates=GOOD.gates[None])
    operands.ids[0, 2, 1] = 7
    with pytest.raises(errors.InvalidValueError, match=r"ids\[0, 2, 1\]: .* got 7"):
        fm.lora_linear(*operands)


def test_the_operators_check_what_they_are_given_themselves():
    with pytest.raises(errors.ShapeError, match="b: expected"):
        torch.ops.fusedmerge.lora_linear(*GOOD._replace(b=floats(4, 5, 2)))
    with pytest.raises(errors.InvalidValueError, match="k: expected 1 to 4"):
        torch.ops.fusedmerge.route_topk(floats(3, 6), floats(4, 6), 5, True)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor or an array, got list"),
        ({"router_weight": None}, TypeError, "router_weight: expected a tensor or an array, got NoneType"),
        ({"x": floats(3, 6, dtype=torch.int64)}, TypeError, "x: expected bfloat16, .*, got torch.int64"),
        ({"router_weight": floats(4, 6, dtype=torch.bool)}, TypeError, "router_weight: expected bfloat16, .*, got torch.bool"),
        ({"x": floats()}, ValueError, r"x: expected \[..., in\], got \[\]"),
        ({"x": floats(3, 5)}, ValueError, r"router_weight: expected \[N, 5\], got \[4, 6\]"),
        ({"router_weight": floats(6)}, ValueError, r"router_weight: expected \[N, 6\], got \[6\]"),
        ({"router_weight": floats(4, 6, device="meta")}, ValueError, r"router_weight: expected a tensor on x's device \(cpu\), got meta"),
        ({"k": 0}, ValueError, r"k: expected 1 to 4 \(the router's rows\), got 0"),
        ({"k": 5}, ValueError, r"k: expected 1 to 4 \(the router's rows\), got 5"),
        ({"k": 2.0}, TypeError, r"k: expected int, got 2.0 \(float\)"),
        ({"k": True}, TypeError, r"k: expected int, got True \(bool\)"),
        ({"normalize": 1}, TypeError, r"normalize: expected bool, got 1 \(int\)"),
        ({"normalize": None}, TypeError, r"normalize: expected bool, got None"),
    ],
)
def test_refused_by_route_topk(changes, kind, message):
    with pytest.raises(errors.FusedMergeError, match=f"^route_topk: {message}") as raised:
        fm.route_topk(**({"x": floats(3, 6), "router_weight": floats(4, 6), "k": 2} | changes))
    assert isinstance(raised.value, kind)


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numpy_in_numpy_out(dtype):
    tensors = ops_kit.make(3, dtype=dtype)
    arrays = [tensor.numpy() for tensor in tensors]
    y = fm.lora_linear(*arrays)
    assert type(y) is np.ndarray and np.array_equal(y, fm.lora_linear(*tensors).numpy())
    found = fm.route_topk(arrays[0], arrays[1], 2)
    assert [type(array) for array in found] == [np.ndarray] * 2 and found[0].dtype == np.int32
    for array, tensor in zip(found, fm.route_topk(tensors.x, tensors.weight, 2), strict=True):
        assert np.array_equal(array, tensor.numpy())


def test_the_kind_of_x_is_the_kind_of_y():
    arrays = [tensor.numpy() for tensor in GOOD]
    assert type(fm.lora_linear(GOOD.x, *arrays[1:])) is torch.Tensor
    y = fm.lora_linear(arrays[0], *differentiable(GOOD)[1:])
    assert type(y) is np.ndarray and np.array_equal(y, fm.lora_linear(*GOOD).numpy())


def differentiable(operands):
    return operands._replace(**{n: t.detach().requires_grad_() for n, t in operands._asdict().items() if t.is_floating_point()})


def test_numpy_arrays_of_any_layout():
    arrays = dict(zip(GOOD._fields, (tensor.numpy() for tensor in GOOD), strict=True))
    expected = fm.lora_linear(**arrays)
    for change in (lambda array: array[::-1].copy()[::-1], np.asfortranarray, read_only):
        changed = {field: change(array) for field, array in arrays.items()}
        np.testing.assert_allclose(fm.lora_linear(**changed), expected, rtol=1e-6, atol=1e-6)
        assert all(np.array_equal(changed[field], arrays[field]) for field in arrays)


def test_a_weight_with_a_negative_stride_is_refused():
    """A switch must write where the caller reads, so no copy will do; torch's DLPack reader would end the process."""
    with pytest.raises(errors.InvalidTypeError, match=r"weights\['w'\]: expected a tensor .*, got ndarray"):
        collect({"w": np.zeros((4, 4), np.float32)[::-1]}, "Switcher")


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("array", [GOOD.x.numpy().astype(">f4"), np.array(["text"]), np.array([None])])
def test_numpy_arrays_that_are_refused(array):
    with pytest.raises(errors.InvalidTypeError, match=r"lora_linear: x: expected an array that torch can use, got ndarray \(.+\)"):
        fm.lora_linear(array, *GOOD[1:])


def test_arrays_known_by_dlpack_alone():
    y = fm.lora_linear(*map(Plain, GOOD))
    assert type(y) is torch.Tensor and torch.equal(y, fm.lora_linear(*GOOD))  # its library has no from_dlpack


def test_y_goes_back_through_the_library_of_x():
    """As CuPy's arrays do, which need a GPU: by the array API's namespace."""

    class Array(Plain):
        def __array_namespace__(self):
            return types.SimpleNamespace(from_dlpack=Array)

    y = fm.lora_linear(Array(GOOD.x), *GOOD[1:])
    assert type(y) is Array and torch.equal(y.tensor, fm.lora_linear(*GOOD))
    ids, gates = fm.route_topk(Array(GOOD.x), GOOD.weight, 2)
    assert type(ids) is type(gates) is Array


@pytest.mark.gpu
def test_cupy_in_cupy_out():
    import cupy

    arrays = [cupy.asarray(tensor.cpu().numpy()) for tensor in GOOD]
    y = fm.lora_linear(*arrays)
    assert type(y) is cupy.ndarray
    np.testing.assert_allclose(y.get(), fm.lora_linear(*GOOD).numpy(), rtol=1e-5, atol=1e-5)
