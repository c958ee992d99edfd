"""Functional operations: route tokens to adapters, and apply each token's own mixture of adapters beside a linear, without merging.

Importing this module registers the operators `torch.ops.fusedmerge.lora_linear` and `route_topk`. docs/fused.md has the whole picture.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from fusedmerge.errors import InvalidTypeError
from fusedmerge.ops.arguments import Operands, as_tensors, like
from fusedmerge.ops.library import group_once

__all__ = ["group_once", "lora_linear", "route_topk"]

Array = TypeVar("Array")


def lora_linear(x: Array, weight: Any, a: Any, b: Any, ids: Any, gates: Any, scaling: Any | None = None, bias: Any | None = None) -> Array:
    """A linear with each token's own mixture of adapters, not merged (LoRA-Switch, arXiv 2405.17741, section 3, for one layer).

    y[t] = W x[t] + bias + sum_j gates[t, j] * scaling[ids[t, j]] * B[ids[t, j]] (A[ids[t, j]] x[t]);  id -1 = no adapter

    x [..., in], weight [out, in], a [N, r, in], b [N, out, r], ids int32 [..., k], gates float32 [..., k], scaling float32 [N] (1 each if
    None), bias [out]; returns y [..., out] in x's dtype. weight and bias have x's dtype, a and b have it too or are float32. An id that a
    token names twice counts twice. Differentiable in all but ids; a compiled graph holds one operator, `fusedmerge::lora_linear`.

    All are torch tensors on one device, of any strides, or arrays that DLPack carries (NumPy, CuPy, ...): y is then of x's kind, and has no
    gradient. Under autocast x, weight, a, b and bias are cast as `torch.nn.functional.linear` casts its own.

    Up to 16 tokens of a 16-bit dtype, on the CPU and in the CUDA kernels: |error| <= half an ulp + 2^-16 S, S = |W| |x| + |bias| +
    sum |gate scaling| |B| |A| |x|. More tokens: W x + bias is rounded too, which adds half an ulp of it. A processor with AVX512-BF16 takes
    subnormal bfloat16 in W and x for 0.

    Raises InvalidTypeError, ShapeError, DtypeError, DeviceError, and BackendError where FUSEDMERGE_BACKEND names one that cannot be used.
    On the CPU also InvalidValueError, for an id outside [-1, N) or a gate that is not finite. On a GPU nothing waits for the device: an id
    outside [-1, N) is no adapter there, and a gate that is not finite spoils its own token's y.
    """
    given = {"x": x, "weight": weight, "a": a, "b": b, "ids": ids, "gates": gates, "scaling": scaling, "bias": bias}
    given = {field: value for field, value in given.items() if value is not None or field not in ("scaling", "bias")}
    operands = Operands(**dict(zip(given, as_tensors("lora_linear", given), strict=True)))
    y = torch.ops.fusedmerge.lora_linear(*_as_autocast(operands))
    return y if isinstance(x, torch.Tensor) else like(y, x)


def route_topk(x: Array, router_weight: Any, k: int, normalize: bool = True) -> tuple[Array, Array]:
    """The k adapters that score highest for each token, and their gates (LoRA-Switch, arXiv 2405.17741, section 3).

    x [..., in], router_weight [N, in] -> ids int32 [..., k], gates float32 [..., k], in descending order of logit; ties go to the lower
    index. Logits and softmax are computed in float32 whatever the dtypes (for float64 x in float64, and so are the gates). normalize=True:
    softmax over the top k logits (for k = 1 over all: the gate would be constant otherwise, and the router without a gradient); False:
    softmax over all, then the top k. A logit of NaN is never chosen: where too few others are left, the id is -1 and the gate 0.
    Differentiable in x and router_weight; autocast changes nothing. Arrays: as for `lora_linear`.

    Raises InvalidTypeError, ShapeError, DtypeError, DeviceError, InvalidValueError (k outside [1, N]), BackendError.
    """
    given, router = as_tensors("route_topk", {"x": x, "router_weight": router_weight})
    for field, value, kind in (("k", k, int), ("normalize", normalize, bool)):
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidTypeError("route_topk", field, f"{kind.__name__}", f"{value!r} ({type(value).__name__})")
    gates, ids = torch.ops.fusedmerge.route_topk(given, router, k, normalize)
    return (ids, gates) if isinstance(x, torch.Tensor) else (like(ids, x), like(gates, x))


def _as_autocast(operands: Operands) -> Operands:
    """Under autocast, the operands of W x and B A x in autocast's dtype; float64 is left alone, as in torch's own operations."""
    device = operands.x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and says so by an error
        return operands
    dtype = torch.get_autocast_dtype(device)
    cast = {}
    for field in ("x", "weight", "a", "b", "bias"):
        tensor = getattr(operands, field)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64:
            cast[field] = tensor.to(dtype)
    return operands._replace(**cast)
