"""The operators `fusedmerge::lora_linear` and `fusedmerge::route_topk`: schema, kernels by device, fake kernels, autograd (torch.library).

A kernel here sees real tensors only, so it may look at values on the CPU, also under torch.compile, which sees one opaque operator.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import linear

from fusedmerge import backend
from fusedmerge.backend.cpu import exact_products
from fusedmerge.backend.linear import Target, add_on_cpu, decode_linear
from fusedmerge.backend.linear import route as kernel_route
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.backend.sgmv import MAX_ADAPTERS, Groups, add_adapters, group_tokens
from fusedmerge.errors import BackendError
from fusedmerge.ops import torch_linear, torch_route
from fusedmerge.ops.arguments import Operands, check_linear, check_route, check_values, wide_dtype
from fusedmerge.ops.torch_linear import DECODE_TOKENS

__all__ = ["group_once", "implementation", "readable"]

logger = logging.getLogger(__name__)
_library = torch.library.Library("fusedmerge", "DEF")
Kernel = Callable[..., Any]


def _define(name: str, signature: str) -> None:
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))


def _kernel(name: str) -> Callable[[Kernel], Kernel]:
    """The function that runs an operator on every device. Autocast ends here: the operator's own dtypes hold."""

    def register(function: Kernel) -> Kernel:
        @functools.wraps(function)
        def without_autocast(first: torch.Tensor, *rest: Any) -> Any:
            device = first.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                return function(first, *rest)

        _library.impl(name, without_autocast, "CompositeExplicitAutograd")
        return function

    return register


# ---------------------------------------------------------------------- which implementation


def implementation(operation: str, num_adapters: int, k: int, *tensors: torch.Tensor) -> str:
    """What runs an operation on these tensors: "sim", "jit" or "aot" (the CUDA kernels: one 16-bit dtype, limited N and k), "native" (their
    twins on the CPU), or "torch".

    Raises BackendError for a backend that FUSEDMERGE_BACKEND names and that cannot be used here.
    """
    x = tensors[0]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(tensor.dtype != x.dtype for tensor in tensors):
        return "torch"
    if x.device.type not in ("cpu", "cuda") or k > MAX_SLOTS or num_adapters > MAX_ADAPTERS:
        return "torch"
    name = _backend(operation, x.device.type, os.environ.get("FUSEDMERGE_BACKEND", ""), os.environ.get("FUSEDMERGE_SIM_LIB", ""))
    if name != "cpu":
        return name
    return "native" if x.device.type == "cpu" and backend.extension() else "torch"


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel can read all of these at their addresses: contiguous in the last dimension, and of no subclass (fake, quantised,
    distributed), whose address says nothing."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and (t.numel() == 0 or t.stride(-1) == 1)) for t in tensors)


@functools.cache
def _backend(operation: str, device_type: str, asked: str, _sim_library: str) -> str:
    """`backend.choose`, asked once for each state of the environment. On a GPU without any, unless one was asked for: torch."""
    try:
        return backend.choose(torch.device(device_type), operation)
    except BackendError as error:
        if asked:
            raise
        logger.warning("%s runs in torch on %s: %s", operation, device_type, error)
        return "cpu"


# ---------------------------------------------------------------------- lora_linear

_OPERANDS = "Tensor x, Tensor weight, Tensor a, Tensor b, Tensor ids, Tensor gates, Tensor? scaling, Tensor? bias"
_define("lora_linear", f"({_OPERANDS}) -> Tensor")
_define("lora_linear_backward", f"(Tensor grad, {_OPERANDS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@_kernel("lora_linear")
def _lora_linear(*given: Any) -> torch.Tensor:
    operands = Operands(*given)
    check_linear(operands)
    x, weight, a, b, ids, _, _, bias = flat = operands.flat()
    if x.device.type == "cpu":
        check_values(operands.ids, operands.gates, len(a))
    name = implementation("lora_linear", len(a), ids.shape[1], x, weight, a)
    if 0 in (*flat.x.shape, *a.shape, *b.shape, ids.shape[1]):
        y = linear(x, weight, bias)
    elif name != "torch":
        y = _by_kernels(name, flat)
    else:
        with nullcontext() if x.dtype == wide_dtype(x) else exact_products():
            y = torch_linear.by_expert(flat) if x.device.type == "cpu" else torch_linear.all_adapters(flat)
    return y.reshape(*operands.x.shape[:-1], len(weight))


def _by_kernels(name: str, operands: Operands) -> torch.Tensor:
    """Up to 16 tokens: the fused kernel, which reads W once. Above: a library GEMM, and segmented products (SGMV) for the adapters, or, on
    the CPU, each token's own."""
    x, weight, a, b = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in operands[:4])
    ids, gates = operands.ids.to(torch.int32).contiguous(), operands.gates.to(torch.float32).contiguous()
    scaling = None if operands.scaling is None else operands.scaling.to(torch.float32).contiguous()
    bias = None if operands.bias is None else operands.bias.contiguous()
    if len(x) <= DECODE_TOKENS:
        return decode_linear(name, x, weight, a, b, ids, gates, scaling, bias)
    y = linear(x, weight, bias)
    if name == "native":
        add_on_cpu(y, x, Target(weight, a, b, scaling), ids, gates)
        return y
    add_adapters(name, y, x, a, b, ids, gates, scaling, _kept_groups(name, operands, ids, gates))
    return y


_kept: ContextVar[dict[Any, Any] | None] = ContextVar("groups that group_once keeps", default=None)


@contextmanager
def group_once() -> Iterator[None]:
    """Inside, ids and gates in the same memory are the same routing: SGMV (more than 16 tokens) groups them by expert once, not in every
    call of `lora_linear`. For one forward of a model whose layers share a routing. The caller must not change ids and gates in place."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def _kept_groups(name: str, operands: Operands, ids: torch.Tensor, gates: torch.Tensor) -> Groups | None:
    kept = _kept.get()
    if kept is None:
        return None
    routing = operands.ids, operands.gates
    key = name, len(operands.a), *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in routing)
    if key not in kept:
        kept[key] = group_tokens(name, ids, gates, len(operands.a)), routing  # kept too, so that nothing else gets their memory
    return kept[key][0]


@torch.library.register_fake("fusedmerge::lora_linear", lib=_library)
def _lora_linear_fake(*given: Any) -> torch.Tensor:
    operands = Operands(*given)
    check_linear(operands)
    return operands.x.new_empty((*operands.x.shape[:-1], operands.weight.shape[0]))


@_kernel("lora_linear_backward")
def _lora_linear_backward(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    """Of flat operands. What is not needed is an empty tensor: an operator returns no None."""
    operands, needs = Operands(*given[:-1]), given[-1]
    compute = torch_linear.by_expert_backward if grad.device.type == "cpu" else torch_linear.all_adapters_backward
    with nullcontext() if grad.dtype == wide_dtype(grad) else exact_products():
        found = compute(grad, operands, needs)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)


@torch.library.register_fake("fusedmerge::lora_linear_backward", lib=_library)
def _lora_linear_backward_fake(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    operands, needs = Operands(*given[:-1]), given[-1]
    asked = zip((operands.x, operands.a, operands.b, operands.gates, operands.scaling), needs, strict=True)
    return tuple(operand.new_empty(operand.shape) if need and operand is not None else grad.new_empty(0) for operand, need in asked)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _differentiate_linear(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    operands = Operands(*ctx.saved_tensors)
    flat = operands.flat()
    grad = grad.reshape(flat.x.shape[0], operands.weight.shape[0])
    of_x, of_weight, of_a, of_b, _, of_gates, of_scaling, of_bias = ctx.needs_input_grad
    needs = [of_x, of_a, of_b, of_gates, of_scaling]
    if not any(needs):
        found: Any = needs
    elif torch.is_grad_enabled():  # to be differentiated again
        found = torch_linear.all_adapters_backward(grad, flat, needs)
    else:
        found = torch.ops.fusedmerge.lora_linear_backward(grad, *flat, needs)
    dx, da, db, dgates, dscaling = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    dx = dx if dx is None else dx.reshape(operands.x.shape)
    dgates = dgates if dgates is None else dgates.reshape(operands.gates.shape)
    dweight = torch_linear.product(grad.T, flat.x).to(grad.dtype) if of_weight else None
    return dx, dweight, da, db, None, dgates, dscaling, grad.sum(dim=0) if of_bias else None


torch.library.register_autograd("fusedmerge::lora_linear", _differentiate_linear, setup_context=_save_linear, lib=_library)


# ---------------------------------------------------------------------- route_topk

# The gates come first: torch.library.opcheck adds the outputs up from the left, and cannot add floats to a sum of integers.
_define("route_topk", "(Tensor x, Tensor router_weight, int k, bool normalize) -> (Tensor gates, Tensor ids)")


@_kernel("route_topk")
def _route_topk(x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    check_route(x, router_weight, k)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    narrow = [router_weight] if router_weight.dtype != torch.float32 else []  # a float32 router is fine beside 16-bit tokens
    name = implementation("route_topk", len(router_weight), k, x, *narrow)
    if name == "torch" or rows.numel() == 0:
        with exact_products():
            ids, gates = torch_route.route(rows, router_weight, k, normalize)
    else:
        ids, gates = kernel_route(name, rows.contiguous(), router_weight.contiguous(), k, normalize)
    return gates.reshape(*x.shape[:-1], k), ids.reshape(*x.shape[:-1], k)


@torch.library.register_fake("fusedmerge::route_topk", lib=_library)
def _route_topk_fake(x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    check_route(x, router_weight, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=wide_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, router_weight, _, ctx.normalize = inputs
    _, ids = output
    ctx.save_for_backward(x, router_weight, ids)


def _differentiate_route(ctx: Any, grad: torch.Tensor, _of_ids: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, router_weight, ids = ctx.saved_tensors
    dx, dw = torch_route.route_backward(grad, x, router_weight, ids, ctx.normalize)
    return dx if ctx.needs_input_grad[0] else None, dw if ctx.needs_input_grad[1] else None, None, None


torch.library.register_autograd("fusedmerge::route_topk", _differentiate_route, setup_context=_save_route, lib=_library)
