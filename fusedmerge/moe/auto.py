"""What strategy "auto" stands for: merged or fused, by the cost of a switch and the number of tokens that a mixture lives for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fusedmerge.cost import TargetSize, fused_work, measure_rates, reads_twice, switch_work
from fusedmerge.errors import FusedMergeError
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.fused_kernels import added_launches
from fusedmerge.moe.routing import TableRouter
from fusedmerge.moe.structure import find
from fusedmerge.weights import check_writable, collect

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["choose"]


def choose(model: torch.nn.Module | Decoder, tokens: Tensor, new_tokens: int) -> str:
    """The strategy for continuing `tokens` [B, T] by `new_tokens`.

    A switch is paid once for a mixture, fused application at each of its tokens. One static adapter lives for the whole generation, and a
    table's mixture as long as in the prompt, on average. A learned router's gates differ at every token: there a switch, which moves more
    bytes than the step itself, is not considered. The rates are the device's, measured once in a process, where they can matter.
    """
    if isinstance(model, Decoder):
        if model.experts is None:
            return "backbone"
        method, routers = model.experts.method, dict(model.experts.routers)
        sizes = {name: _size(model.weights[name], linear.a) for name, linear in model.experts.linears.items()}
    else:
        found = find(model)
        if found is None:
            return "backbone"
        method, routers = found.config.method, dict(found.routers)
        sizes = {name: _size(part.base_layer.weight, part.lora_A) for name, part in found.linears.items()}
    k, life = 1, float(new_tokens)
    if method != "lora":
        router = routers.get("router")
        if method != "lora_switch" or not isinstance(router, TableRouter) or len(tokens) > 1:
            return "fused"
        k, life = int(router.ids.shape[-1]), _lifetime(router, tokens, new_tokens)
    if life <= 1 or not _writable(model, sizes):
        return "fused"
    rates = measure_rates(tokens.device)
    launches = added_launches(model, len(tokens)) if isinstance(model, Decoder) else None
    beside = fused_work([*sizes.values()], k, k, launches=launches, second_pass=reads_twice(tokens.device)).seconds(rates)
    return "merged" if life * beside > switch_work([*sizes.values()], k).seconds(rates) else "fused"


def _writable(model: torch.nn.Module | Decoder, sizes: Mapping[str, TargetSize]) -> bool:
    """Whether a Switcher takes these weights (none tied to another, none in float64)."""
    weights = model.weights if isinstance(model, Decoder) else model
    try:
        check_writable({name: (size.rows, size.cols) for name, size in sizes.items()}, collect(weights, "generate"), "generate")
    except FusedMergeError:
        return False
    return True


def _size(weight: Tensor, a: Tensor) -> TargetSize:
    """Factors are used in the weight's dtype."""
    return TargetSize(weight.shape[0], weight.shape[1], a.shape[1], weight.element_size(), weight.element_size())


def _lifetime(table: TableRouter, tokens: Tensor, new_tokens: int) -> float:
    """How many tokens in a row keep their mixture, on average, in the prompt tokens [1, T]; all to come, where it never changes there."""
    ids, gates = (part[0] for part in table(tokens))  # [T, k] each
    changes = int(((ids[1:] != ids[:-1]) | (gates[1:] != gates[:-1])).any(dim=-1).sum())
    return tokens.shape[1] / (changes + 1) if changes else float(new_tokens)
