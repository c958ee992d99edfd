"""Adapted linears: y = W x + b + sum_j g_j s B_j (A_j x). What differs between the methods is where the gates g come from.

- lora_switch (arXiv 2405.17741, section 3): y^l = f^l(x^l) + sum_i G^1(x^1)_i E_i^l(x^l), G^1 = softmax of the top k of x^1 W_r, x^1 the
  input of the first adapted linear. moral (arXiv 2402.11260): the same with a G in each layer, from the layer's first adapted linear.
- mola (arXiv 2402.08562): each linear its own G(x) = softmax(W_r x), of which the top k are kept and divided by their sum.
- molora (arXiv 2309.05444, "soft merging"): G(x) = softmax(W_r x) over all N. loramoe (arXiv 2312.09979): the same, on the MLP's linears.
- lora (arXiv 2106.09685): N = 1 and g = 1. xlora: fusedmerge.moe.xlora. mixlora and pesc: fusedmerge.moe.blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from fusedmerge.moe.routing import Owner, Router, decide, wide_precision
from fusedmerge.ops import lora_linear

__all__ = ["Experts", "MoELinear", "coefficients", "lora_delta"]


def coefficients(ids: torch.Tensor, gates: torch.Tensor, scaling: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gates * scaling by expert: ids [..., k], gates [..., k], scaling [N] -> [T, N] in `dtype`. id -1 adds nothing; duplicates add."""
    k = ids.shape[-1]
    chosen, given = ids.reshape(-1, k).long(), gates.reshape(-1, k).to(dtype)
    weights = torch.where(chosen >= 0, given * scaling.to(dtype)[chosen.clamp_min(0)], 0.0)
    return weights.new_zeros(len(chosen), len(scaling)).scatter_add(1, chosen.clamp_min(0), weights)


def lora_delta(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    """sum_j gates[t, j] scaling[ids[t, j]] B (A x[t]): what `lora_linear` adds to W x, [..., out] in float32 (float64 for float64 x)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_expert = coefficients(ids, gates, scaling, dtype)
    z = torch.einsum("ti,nri->tnr", x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype)) * per_expert[..., None]
    return torch.einsum("tnr,nor->to", z, b.to(dtype)).reshape(*x.shape[:-1], b.shape[1])


class Experts(nn.Module):
    """N stacked low-rank experts, and where their routing comes from.

    lora_A [N, r, in], lora_B [N, out, r]: Parameters, float32 beside 16-bit weights (as PEFT), else the weight's dtype.
    scaling [N]: a float32 buffer, whatever the model is cast to.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: torch.Tensor
    first: torch.Tensor
    whole: torch.Tensor

    def __init__(self, owner: Owner, name: str, router: Router | None = None, shared: str | None = None) -> None:
        super().__init__()
        self.owner = owner
        self.name = name  # canonical, of the module that this one stands for
        self.router = router
        self.shared = shared  # the name of the router that several linears share
        self.static = router is None and shared is None

    def _make_factors(
        self, num_experts: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        """shape: (out, in) of the experts. PEFT's initialisation of A and B."""
        config = self.owner.config
        r, (out_features, in_features) = int(config.r or 0), shape
        dtype = torch.float32 if dtype.itemsize < 4 else dtype

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(size[-1])  # kaiming_uniform_ with a = sqrt(5): what nn.Linear starts from
            return torch.empty(size, device="cpu").uniform_(-bound, bound, generator=generator)

        if config.init_lora_weights == "gaussian":
            a = torch.randn(num_experts, r, in_features, generator=generator, device="cpu") / r
        else:
            a = uniform(num_experts, r, in_features)
        b = uniform(num_experts, out_features, r) if config.init_lora_weights is False else torch.zeros(num_experts, out_features, r)
        self.lora_A = nn.Parameter(a.to(device, dtype), requires_grad=config.train_experts)
        self.lora_B = nn.Parameter(b.to(device, dtype), requires_grad=config.train_experts)
        self.register_buffer("scaling", torch.full((num_experts,), config.scaling, dtype=torch.float32, device=device))
        self.register_buffer("first", torch.zeros(1, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("whole", torch.ones(1, dtype=torch.float32, device=device), persistent=False)

    @property
    def num_experts(self) -> int:
        """N."""
        return int(self.lora_A.shape[0])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Experts:
        kept = {name: getattr(self, name) for name in ("scaling", "whole")}
        super()._apply(fn, recurse)
        for name, exact in kept.items():
            setattr(self, name, exact.to(getattr(self, name).device))
        return self

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., in] -> ids [..., k], gates [..., k]: of this module's own router, or of the forward's shared one."""
        if self.static:
            return self.first.expand(*x.shape[:-1], 1), self.whole.expand(*x.shape[:-1], 1)
        return decide(self.owner, self.shared or self.name, x, self.router, self.name)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x as the experts see it."""
        return nn.functional.dropout(x, self.owner.config.lora_dropout or 0.0, self.training)

    @property
    def drops(self) -> bool:
        return self.training and bool(self.owner.config.lora_dropout)


class MoELinear(Experts):
    """y = W x + bias + sum_j gate_j scaling_j B_j (A_j x), with base_layer = (W, bias) frozen.

    The original nn.Linear lives on as `base_layer`, so that its weight keeps its canonical name.
    """

    def __init__(
        self,
        owner: Owner,
        name: str,
        base_layer: nn.Linear,
        num_experts: int,
        router: Router | None,
        shared: str | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(owner, name, router, shared)
        self.base_layer = base_layer
        weight = base_layer.weight
        self._make_factors(num_experts, (weight.shape[0], weight.shape[1]), weight.dtype, weight.device, generator)

    @property
    def in_features(self) -> int:
        return int(self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base_layer.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """base_layer's (some models read a linear's dtype or device from it)."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if self.owner.is_suspended:
            return self.base_layer(x)
        self.owner.note(self.name)
        return self.mixed(x, *self.route(x))

    def mixed(self, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The linear with a given mixture for each token: ids [..., k], gates [..., k]."""
        x, weight, bias, a, b = self._at_precision(x)
        with wide_precision(x.device):
            if self.drops:
                out = nn.functional.linear(x, weight, bias)
                return out + lora_delta(self.dropped(x), a, b, ids, gates, self.scaling).to(out.dtype)
            return lora_linear(x, weight, a, b, ids, gates, self.scaling, bias)

    def each(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Every chosen expert's own output, W x + scaling_j B_j (A_j x): x [..., in] or [..., k, in], ids [..., k] -> [..., k, out]."""
        x, weight, bias, a, b = self._at_precision(x)
        with wide_precision(x.device):
            out = nn.functional.linear(x, weight, bias)
            seen = self.dropped(x)
            if x.dim() == ids.dim():
                out, seen = out[..., None, :], seen[..., None, :].expand(*ids.shape, x.shape[-1])
            delta = lora_delta(seen, a, b, ids[..., None], torch.ones_like(ids[..., None], dtype=torch.float32), self.scaling)
            return out + delta.to(out.dtype)

    def _at_precision(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """x, W, bias, A, B in the dtype that the linear computes in: autocast's, or x's."""
        layer = self.base_layer
        weight: torch.Tensor = layer.weight
        bias: torch.Tensor | None = layer.bias
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return x, weight, bias, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, r={self.lora_A.shape[1]}"
