"""`route_topk` and its gradients in torch, on any device."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from fusedmerge.ops.arguments import wide_dtype

__all__ = ["route", "route_backward"]


def route(x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int32 and gates [..., k], by descending logit; ties go to the lower index, as the sort is stable."""
    logits = _logits(x, router_weight)
    missing = logits.isnan()
    top, order = torch.sort(logits.masked_fill(missing, -torch.inf), dim=-1, descending=True, stable=True)
    ids = order[..., :k]
    gates = torch.softmax(top[..., :k], dim=-1) if _over_top(k, normalize) else torch.softmax(logits, dim=-1).gather(-1, ids)
    none = missing.gather(-1, ids)
    return ids.masked_fill(none, -1).to(torch.int32), gates.masked_fill(none, 0.0)


def route_backward(
    grad: torch.Tensor, x: torch.Tensor, router_weight: torch.Tensor, ids: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and router_weight from those of the gates; differentiable in turn."""
    logits, none, ids = _logits(x, router_weight), ids < 0, ids.clamp_min(0).long()
    grad = grad.to(logits.dtype).masked_fill(none, 0.0)
    if _over_top(ids.shape[-1], normalize):
        gates = torch.softmax(logits.gather(-1, ids).masked_fill(none, -torch.inf), dim=-1)
        of_top = gates * (grad - (grad * gates).sum(dim=-1, keepdim=True))
        of_logits = torch.zeros_like(logits).scatter_add(-1, ids, of_top)
    else:
        gates = torch.softmax(logits, dim=-1)
        spread = torch.zeros_like(logits).scatter_add(-1, ids, grad)
        of_logits = gates * (spread - (spread * gates).sum(dim=-1, keepdim=True))
    dx = of_logits @ router_weight.to(logits.dtype)
    dw = of_logits.reshape(-1, len(router_weight)).T @ x.to(logits.dtype).reshape(-1, x.shape[-1])
    return dx.to(x.dtype), dw.to(router_weight.dtype)


def _logits(x: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    return linear(x.to(wide_dtype(x)), router_weight.to(wide_dtype(x)))


def _over_top(k: int, normalize: bool) -> bool:
    """Softmax over the top k alone. For k = 1 that would be 1 whatever x is."""
    return normalize and k > 1
