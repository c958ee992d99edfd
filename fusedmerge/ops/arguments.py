"""What the operations accept: arrays of other libraries, and the checks that come before anything is computed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fusedmerge.checks import as_tensor
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError

__all__ = ["Operands", "as_tensors", "check_linear", "check_route", "check_values", "like", "wide_dtype"]


class Operands(NamedTuple):
    """What `lora_linear` is given."""

    x: torch.Tensor  # [..., in]
    weight: torch.Tensor  # [out, in]
    a: torch.Tensor  # [N, r, in]
    b: torch.Tensor  # [N, out, r]
    ids: torch.Tensor  # [..., k]
    gates: torch.Tensor  # [..., k]
    scaling: torch.Tensor | None = None  # [N]
    bias: torch.Tensor | None = None  # [out]

    def flat(self) -> Operands:
        """The same over matrices: x [T, in], ids and gates [T, k]."""
        if self.x.dim() == 2:
            return self
        x, ids, gates = (tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]) for tensor in (self.x, self.ids, self.gates))
        return self._replace(x=x, ids=ids, gates=gates)


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FEW_IDS = 64
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def as_tensors(operation: str, given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Tensors as they are, and NumPy, CuPy and other arrays as tensors over their memory. Raises InvalidTypeError for anything else."""
    return [array if isinstance(array, torch.Tensor) else _wrap(operation, field, array) for field, array in given.items()]


def _wrap(operation: str, field: str, array: Any) -> torch.Tensor:
    try:
        if min(getattr(array, "strides", None) or (0,)) < 0:  # torch has none
            array = array.copy()
        tensor = as_tensor(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidTypeError(operation, field, "an array that torch can use", f"{type(array).__name__} ({error})") from error
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(operation, field, "a tensor or an array", type(array).__name__)
    return tensor


def like(tensor: torch.Tensor, given: Any) -> Any:
    """`tensor` as the kind of array that `given` is: NumPy and CuPy arrays and their kin; a tensor where that is not known."""
    if isinstance(given, torch.Tensor):
        return tensor
    tensor = tensor.detach()
    if type(given).__module__ == "numpy":
        return tensor.numpy()
    library: Any = importlib.import_module(type(given).__module__.partition(".")[0])
    if hasattr(given, "__array_namespace__"):
        library = given.__array_namespace__()
    return library.from_dlpack(tensor) if hasattr(library, "from_dlpack") else tensor


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_tensors(operation: str, given: Mapping[str, torch.Tensor | None]) -> None:
    """Every tensor is dense and on x's device; every one but ids holds floats, ids hold integers."""
    x = given["x"]
    assert x is not None
    for field, tensor in given.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise DeviceError(operation, field, f"a tensor on x's device ({x.device})", tensor.device)
        if tensor.layout != torch.strided:
            raise ShapeError(operation, field, "a dense tensor", tensor.layout)
        if field == "ids" and tensor.dtype not in _INTEGERS:
            raise DtypeError(operation, field, "int32 (or int8, int16, int64)", tensor.dtype)
        if field != "ids" and tensor.dtype not in _FLOATS:
            raise DtypeError(operation, field, "bfloat16, float16, float32 or float64", tensor.dtype)


def check_linear(operands: Operands) -> None:
    """Devices, dtypes and shapes of `lora_linear`. Raises DeviceError, DtypeError, ShapeError."""
    operation, (x, weight, a, b, ids, gates, scaling, bias) = "lora_linear", operands
    _check_tensors(operation, operands._asdict())
    for field, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise DtypeError(operation, field, f"x's dtype ({x.dtype})", tensor.dtype)
    if a.dtype not in (x.dtype, wide_dtype(x)):
        raise DtypeError(operation, "a", " or ".join(sorted({str(x.dtype), str(wide_dtype(x))})), a.dtype)
    if b.dtype != a.dtype:
        raise DtypeError(operation, "b", f"a's dtype ({a.dtype})", b.dtype)
    if x.dim() < 1:
        raise ShapeError(operation, "x", "[..., in]", list(x.shape))
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(operation, "weight", f"[out, {x.shape[-1]}]", list(weight.shape))
    if a.dim() != 3 or a.shape[2] != weight.shape[1]:
        raise ShapeError(operation, "a", f"[N, r, {weight.shape[1]}]", list(a.shape))
    if ids.dim() != x.dim() or ids.shape[:-1] != x.shape[:-1]:
        raise ShapeError(operation, "ids", f"[{', '.join(map(str, (*x.shape[:-1], 'k')))}]", list(ids.shape))
    num_adapters, rank, out = a.shape[0], a.shape[1], weight.shape[0]
    rest = (b, [num_adapters, out, rank]), (gates, [*ids.shape]), (scaling, [num_adapters]), (bias, [out])
    for name, (tensor, shape) in zip(("b", "gates", "scaling", "bias"), rest, strict=True):
        if tensor is not None and [*tensor.shape] != shape:
            raise ShapeError(operation, name, shape, list(tensor.shape))


def check_values(ids: torch.Tensor, gates: torch.Tensor, num_adapters: int) -> None:
    """Raise InvalidValueError for an id outside [-1, N), or a gate that is not finite (in an empty slot too). Waits for a device."""
    few = ids.numel() <= _FEW_IDS  # a decode step: Python is faster than seven tensor operations
    if few and all(-1 <= i < num_adapters for i in ids.flatten().tolist()) and all(map(math.isfinite, gates.flatten().tolist())):
        return
    good_ids, good_gates = (ids >= -1) & (ids < num_adapters), torch.isfinite(gates)
    if bool((good_ids & good_gates).all()):
        return
    expected = f"-1 (no adapter) or 0 to {num_adapters - 1}" if num_adapters else "-1 (there is no adapter)"
    for field, tensor, good, wanted in (("ids", ids, good_ids, expected), ("gates", gates, good_gates, "a finite gate")):
        if not bool(good.all()):
            where = (~good).nonzero()[0].tolist()
            raise InvalidValueError("lora_linear", f"{field}{where}", wanted, tensor[tuple(where)].item())


def check_route(x: torch.Tensor, router_weight: torch.Tensor, k: int) -> None:
    """Devices, dtypes and shapes of `route_topk`. Raises DeviceError, DtypeError, ShapeError, InvalidValueError."""
    operation = "route_topk"
    _check_tensors(operation, {"x": x, "router_weight": router_weight})
    if x.dim() < 1:
        raise ShapeError(operation, "x", "[..., in]", list(x.shape))
    if router_weight.dim() != 2 or router_weight.shape[1] != x.shape[-1]:
        raise ShapeError(operation, "router_weight", f"[N, {x.shape[-1]}]", list(router_weight.shape))
    if not 1 <= k <= router_weight.shape[0]:
        raise InvalidValueError(operation, "k", f"1 to {router_weight.shape[0]} (the router's rows)", k)
