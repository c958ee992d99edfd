"""Fused application at decode: the router, and linears whose tokens each bring their own mixture of adapters (docs/kernels/lora_linear.md).

Tensors are checked by the caller (fusedmerge/ops.py): 2-D, columns contiguous, of one 16-bit dtype and one device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.kernels import Launcher, launcher
from fusedmerge.backend.linear_params import RouteParams

if TYPE_CHECKING:
    import torch

__all__ = ["route"]


def _kernel(header: str, params: str, call: str, dtype: torch.dtype, suffix: str = "", blocks: int = 1) -> Kernel:
    """`call` for x's dtype, as cuda/src/kernels_linear.cu names it."""
    name, number = {"torch.bfloat16": ("bf16", "Bf16"), "torch.float16": ("fp16", "Fp16")}[str(dtype)]
    stem = call.removeprefix("run_").split("<")[0]
    return Kernel(header, params, call.replace("T", number, 1), f"{stem}_{name}{suffix}", blocks=blocks)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])


def route(
    backend: str,
    x: torch.Tensor,
    router_weight: torch.Tensor,
    k: int,
    normalize: bool = True,
    mask: torch.Tensor | None = None,
    *,
    on: Launcher | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k adapters that score highest for each token, and their gates: one launch (`ops.route_topk` tells the meaning).

    x [T, in], router_weight [N, in] (N up to 4096, k up to 32), mask int32 [T] (0: padding, which gets ids -1 and gates 0)
    -> ids int32 [T, k], gates float32 [T, k]
    """
    import torch

    ids = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    gates = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    params = RouteParams(
        x=x.data_ptr(),
        router=router_weight.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        ids=ids.data_ptr(),
        gates=gates.data_ptr(),
        x_stride=x.stride(0),
        router_stride=router_weight.stride(0),
        cols=x.shape[1],
        num_adapters=len(router_weight),
        num_slots=k,
        normalize=normalize,
        x_aligned=_aligned(x),
        router_aligned=_aligned(router_weight),
    )
    if len(x):
        kernel = _kernel("route.cuh", "RouteParams", "run_route<T>", x.dtype)
        (on or launcher(backend, x.device)).launch(kernel, params, len(x), 4 * len(router_weight))
    return ids, gates
