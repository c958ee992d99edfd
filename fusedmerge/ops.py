"""Functional operations: route tokens to adapters, and apply each token's own mixture of adapters beside a linear, without merging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError

if TYPE_CHECKING:
    import torch

__all__ = ["lora_linear", "route_topk"]


def route_topk(x: torch.Tensor, router_weight: torch.Tensor, k: int, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The k adapters that score highest for each token, and their gates (LoRA-Switch, arXiv 2405.17741, section 3).

    x [..., in], router_weight [N, in] -> ids int32 [..., k], gates float32 [..., k], in descending order of score; ties go to the lower
    index. Logits and softmax are computed in float32. normalize=True: softmax over the top k logits (for k = 1 over all: the gate would be
    constant otherwise, and the router without a gradient); False: softmax over all, then the top k. Differentiable in x and router_weight.

    Raises InvalidTypeError, ShapeError, DtypeError, DeviceError, InvalidValueError (k outside [1, N]).
    """
    import torch

    operation = "route_topk"
    for field, tensor in (("x", x), ("router_weight", router_weight)):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTypeError(operation, field, "a tensor", type(tensor).__name__)
        if not tensor.is_floating_point():
            raise DtypeError(operation, field, "floats", tensor.dtype)
    if router_weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != router_weight.shape[1]:
        raise ShapeError(operation, "router_weight", f"[N, {x.shape[-1] if x.dim() else 'in'}]", list(router_weight.shape))
    if router_weight.device != x.device:
        raise DeviceError(operation, "router_weight", f"a tensor on x's device ({x.device})", router_weight.device)
    if isinstance(k, bool) or not isinstance(k, int):
        raise InvalidTypeError(operation, "k", "an int", type(k).__name__)
    if not 1 <= k <= router_weight.shape[0]:
        raise InvalidValueError(operation, "k", f"1 to {router_weight.shape[0]} (the router's rows)", k)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = torch.nn.functional.linear(x.to(wide), router_weight.to(wide))  # [..., N]
    scores = logits if normalize and k > 1 else torch.softmax(logits, dim=-1)
    top, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    gates = torch.softmax(top[..., :k], dim=-1) if normalize and k > 1 else top[..., :k]
    return ids[..., :k].to(torch.int32), gates


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    scaling: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear with each token's own mixture of adapters, not merged.

    y[t] = W x[t] + bias + sum_j gates[t, j] * scaling[ids[t, j]] * B[ids[t, j]] (A[ids[t, j]] x[t]);  id -1 = no adapter

    x [..., in], weight [out, in], a [N, r, in], b [N, out, r], ids int32 [..., k], gates float32 [..., k], scaling float32 [N] (1 each if
    None), bias [out]; y [..., out] in x's dtype. Differentiable in x, weight, a, b, gates, scaling and bias.

    Raises InvalidTypeError, ShapeError, DtypeError, DeviceError.
    """
    import torch

    _check_linear(x, weight, a, b, ids, gates, scaling, bias)
    out = torch.nn.functional.linear(x, weight, bias)
    num_adapters, k = a.shape[0], ids.shape[-1]
    if num_adapters == 0 or k == 0:
        return out
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, chosen = x.reshape(-1, x.shape[-1]), ids.reshape(-1, k).long()
    scales = torch.ones(num_adapters, dtype=wide, device=x.device) if scaling is None else scaling.to(wide)
    coefficients = torch.where(chosen >= 0, gates.reshape(-1, k).to(wide) * scales[chosen.clamp_min(0)], 0.0)  # [T, k]
    per_adapter = torch.zeros(len(tokens), num_adapters, dtype=wide, device=x.device).scatter_add(1, chosen.clamp_min(0), coefficients)
    z = torch.einsum("ti,nri->tnr", tokens.to(wide), a.to(wide)) * per_adapter[..., None]  # every adapter's shrink: no host reads ids
    delta = torch.einsum("tnr,nor->to", z, b.to(wide))
    return (out.to(wide) + delta.reshape(out.shape)).to(out.dtype)


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    scaling: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    import torch

    operation = "lora_linear"
    given = {"x": x, "weight": weight, "a": a, "b": b, "ids": ids, "gates": gates}
    given |= {name: value for name, value in (("scaling", scaling), ("bias", bias)) if value is not None}
    for field, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTypeError(operation, field, "a tensor", type(tensor).__name__)
        if tensor.device != x.device:
            raise DeviceError(operation, field, f"a tensor on x's device ({x.device})", tensor.device)
        if tensor.is_floating_point() == (field == "ids"):
            raise DtypeError(operation, field, "int32" if field == "ids" else "floats", tensor.dtype)
    for field in ("weight", "a", "b"):
        if given[field].dtype != x.dtype:
            raise DtypeError(operation, field, f"x's dtype ({x.dtype})", given[field].dtype)
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(operation, "weight", f"[out, {x.shape[-1] if x.dim() else 'in'}]", list(weight.shape))
    if a.dim() != 3 or a.shape[2] != weight.shape[1]:
        raise ShapeError(operation, "a", f"[N, r, {weight.shape[1]}]", list(a.shape))
    expected: dict[str, list[int]] = {"b": [a.shape[0], weight.shape[0], a.shape[1]]}
    expected["ids"] = [*x.shape[:-1], ids.shape[-1] if ids.dim() else 0]
    expected["gates"] = list(ids.shape)
    expected["scaling"], expected["bias"] = [a.shape[0]], [weight.shape[0]]
    for field, shape in expected.items():
        if field in given and list(given[field].shape) != shape:
            raise ShapeError(operation, field, shape, list(given[field].shape))
