"""Fused application at decode: the router, and linears whose tokens each bring their own mixture of adapters (docs/kernels/lora_linear.md).

    x -> prologue: (residual, norm or SiLU * up), router, shrink -> GEMV: W x + B z + bias + residual, several targets at once

Tensors are checked by the caller (fusedmerge/ops): 2-D, columns contiguous, of one 16-bit dtype and one device. Rows may be strided and
begin anywhere; what is not 16-byte aligned is read element by element. Results and workspace come from torch's allocator, in the stream's
order: a call may be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusedmerge.backend import linear_params as lp
from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.cuda import load_extension
from fusedmerge.backend.kernels import Launcher, launcher
from fusedmerge.backend.linear_group import (
    KNOWN,
    ONE_CHOICE,
    Applied,
    Group,
    Known,
    Norm,
    Router,
    Silu,
    Target,
    check_count,
    describe,
    dtype_names,
    flags_of,
    router_flags,
)
from fusedmerge.backend.linear_params import LinearParams, RouteParams
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["KNOWN", "Applied", "Group", "Known", "Norm", "Router", "Silu", "Target", "add_on_cpu", "decode_group", "decode_linear", "route"]

_MAX_ROUTED = 4096  # N of the router alone: its logits are in 48 KB of shared memory


def route(
    backend: str | Launcher, x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool = True, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k adapters that score highest for each token, and their gates: one launch (`ops.route_topk` tells the meaning).

    x [T, in], router_weight [N, in] of x's dtype or float32 (N up to 4096, k up to 32), mask int32 [T] (0: padding: ids -1, gates 0)
    -> ids int32 [T, k], gates float32 [T, k]. Raises InvalidValueError for larger N and k.
    """
    import torch

    check_count("k", "slots of a token", k, MAX_SLOTS, "route_topk")
    check_count("router_weight", "adapters", len(router_weight), _MAX_ROUTED, "route_topk")
    ids, gates = x.new_empty(len(x), k, dtype=torch.int32), x.new_empty(len(x), k, dtype=torch.float32)
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
        flags=flags_of((x, lp.X_ALIGNED)) | router_flags(x, router_weight),
    )
    if len(x):
        name, number = dtype_names(str(x.dtype))
        kernel = Kernel("route.cuh", "RouteParams", f"run_route<{number}>", f"route_{name}")
        launcher(backend, x.device).launch(kernel, params, len(x), 4 * len(router_weight))
    return ids, gates


def decode_linear(
    backend: str | Launcher,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    scaling: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [T, out] of one matrix, T up to 16: `ops.lora_linear` tells the meaning and the shapes."""
    return decode_group(backend, x, [Target(weight, a, b, scaling, bias)], Known(ids, gates)).ys[0]


def decode_group(
    backend: str | Launcher,
    x: torch.Tensor,
    targets: Sequence[Target],
    routing: Known | Router | Sequence[Router | None] | None = None,
    source: Norm | Silu | None = None,
) -> Applied:
    """Up to four linears that share x [T, in], T up to 16: two launches; one where there is neither adapter nor source.

    routing: of all targets, or a router for each (the same object: one choice); None applies no adapter. source: how x is made, from the
    given input; None: it is the input. All targets have the same N, that of the routers. Raises InvalidValueError for more of anything
    (slots: of all routers together, 32), for targets of different N, and for routers of different N, k, normalize or dtype.
    """
    each = list(routing) if isinstance(routing, Sequence) else [routing] * len(targets)
    known = next((given for given in each if isinstance(given, Known)), None)
    if any(isinstance(given, Known) and given is not known for given in each):
        raise InvalidValueError("lora_linear", "routing", ONE_CHOICE, "different known ids")
    group = Group(targets, [KNOWN if isinstance(given, Known) else given for given in each])
    return group.run(launcher(backend, x.device), x, known, source, [target.residual for target in targets])


def add_on_cpu(y: torch.Tensor, x: torch.Tensor, target: Target, ids: torch.Tensor, gates: torch.Tensor, isa: str = "") -> None:
    """What `sgmv.add_adapters` does on a GPU, by the extension: y [T, out] += each token's adapters, rounded once, for any T.

    ids int32 [T, k], gates float32 [T, k], k up to 32; `target` without its weight; isa: "": the best. Raises InvalidValueError.
    """
    import torch

    params = LinearParams(tokens=x.shape[0], cols=x.shape[1], num_targets=1, num_routings=1, num_slots=ids.shape[1])
    check_count("ids", "slots of a token", ids.shape[1], MAX_SLOTS)
    params.num_adapters, params.ids, params.gates = 0 if target.a is None else target.a.shape[0], ids.data_ptr(), gates.data_ptr()
    params.x, params.x_stride = x.data_ptr(), x.stride(0)
    described = params.targets[0]
    describe(described, target, with_adapters=True)
    described.y, described.y_stride = y.data_ptr(), y.stride(0)
    torch.autograd.graph.increment_version(y)
    load_extension().linear_cpu(f"add_{dtype_names(str(x.dtype))[0]}", 1, ctypes.addressof(params), torch.get_num_threads(), isa)
