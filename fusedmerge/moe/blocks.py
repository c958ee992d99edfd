"""Methods that route a whole MLP: MixLoRA and PESC. A non-linearity lies between the parts of an expert, so none can be merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmerge.moe.layers import Experts, MoELinear, coefficients
from fusedmerge.moe.routing import Owner, Router, decide, wide_precision

if TYPE_CHECKING:
    from fusedmerge.moe.targets import Block

__all__ = ["MixLoRABlock", "PESCBlock"]


class MixLoRABlock(nn.Module):
    """y = sum_j gate_j E_j(x), E_j(x) = down_j(act(gate_j(x)) * up_j(x)), each with its own LoRA: W x + scaling B_j (A_j x).

    MixLoRA (arXiv 2404.15159, section 3). base_layer is the MLP; its gate_proj, up_proj and down_proj are MoELinears, or plain where
    not targeted. The router reads the MLP's input.
    """

    def __init__(self, owner: Owner, name: str, base_layer: nn.Module, router: Router) -> None:
        super().__init__()
        self.owner, self.name, self.base_layer, self.router = owner, name, base_layer, router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., in]."""
        mlp: Any = self.base_layer
        if self.owner.is_suspended:
            return mlp(x)
        ids, gates = decide(self.owner, self.name, x, self.router, self.name)
        hidden = mlp.act_fn(_each(mlp.gate_proj, x, ids)) * _each(mlp.up_proj, x, ids)  # [..., k, hidden]; 1 for k if neither has experts
        out = _each(mlp.down_proj, hidden.expand(*ids.shape, hidden.shape[-1]), ids)  # [..., k, in]
        return (out * gates[..., None].to(out.dtype)).sum(dim=-2)


def _each(linear: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Every chosen expert's output of one of the block's linears: [..., k, out], or [..., 1, out] where it has no experts."""
    if isinstance(linear, MoELinear):
        return linear.each(x, ids)
    out = linear(x)
    return out if x.dim() > ids.dim() else out[..., None, :]


class PESCBlock(Experts):
    """y = h + sum_j gate_j scaling Up_j(GELU(Down_j(h))), h = MLP(x); the router reads x.

    PESC (arXiv 2401.02731, section 2.3) writes sum_j gate_j (h + scaling Up_j(...)) with gates that sum to 1: the same.
    Down is lora_A [N, r, d], Up is lora_B [N, d, r]; dropout on h, as its authors' code has it. base_layer is the MLP.
    """

    def __init__(self, owner: Owner, block: Block, name: str, router: Router, generator: torch.Generator) -> None:
        super().__init__(owner, name, router)
        self.base_layer = block.module
        self._make_factors(block.num_experts, (block.out_features, block.out_features), block.dtype, block.device, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        h: torch.Tensor = self.base_layer(x)
        if self.owner.is_suspended:
            return h
        ids, gates = self.route(x)
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        with wide_precision(h.device):
            seen = self.dropped(h).reshape(-1, h.shape[-1]).to(dtype)
            z = nn.functional.gelu(torch.einsum("ti,nri->tnr", seen, self.lora_A.to(dtype)))
            z = z * coefficients(ids, gates, self.scaling, dtype)[..., None]
            delta = torch.einsum("tnr,nor->to", z, self.lora_B.to(dtype))
            return (h.to(dtype) + delta.reshape(h.shape)).to(h.dtype)
