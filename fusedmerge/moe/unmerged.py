"""How a decoder's linears are applied without merging: plain, or with experts beside them. The kernels' way is in fused_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fusedmerge.moe.decoder_files import bias_name
from fusedmerge.moe.experts import ExpertLinear
from fusedmerge.moe.routing import TableRouter
from fusedmerge.ops import lora_linear

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.decoder import Cache, Decoder

__all__ = ["Apply", "Fused", "Routed", "Unfused", "add_unfused"]


class Apply:
    """Strategy `backbone`, and what the others build on."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.chosen: dict[str | None, tuple[Tensor, Tensor]] = {}  # by each router that was asked in this forward

    def start(self, tokens: Tensor, cache: Cache) -> None:
        """A forward of tokens [B, T] begins."""

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """The linears `names`, which share x [B, T, in]: [B, T, out] each."""
        return self.decoder.linears(x, names)

    def project_normed(self, x: Tensor, norm: str, names: Sequence[str]) -> Sequence[Tensor]:
        """The linears `names` of the norm of the residual stream x [B, T, hidden]."""
        return self.project(self.decoder.norm(x, norm), names)

    def project_added(self, x: Tensor, name: str, stream: Tensor) -> Tensor:
        """stream [B, T, hidden] + the linear `name` of x [B, T, in]."""
        return stream + self.project(x, (name,))[0]

    def feed_forward(self, x: Tensor, norm: str, gate: str, up: str, down: str) -> Tensor:
        """x + mlp(norm x), [B, T, hidden]."""
        return x + self.mlp(self.decoder.norm(x, norm), gate, up, down)

    def mlp(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        """down(silu(gate x) * up x), [B, T, hidden]."""
        gated, value = self.project(x, (gate, up))  # [B, T, intermediate] each
        return self.project(F.silu(gated) * value, (down,))[0]

    def restore(self) -> None:
        """Make the weights what they were."""

    def close(self) -> None:
        """Restore, for good."""
        self.restore()


class Routed(Apply):
    """Experts chosen in the forward: each router is asked once, where it is first met."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        assert decoder.experts is not None
        self.experts = decoder.experts
        self._static: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def start(self, tokens: Tensor, cache: Cache) -> None:
        self.tokens, self.cache, self.chosen = tokens, cache, {}

    def route(self, router: str | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids int32 [B, T, k] and gates float32 [B, T, k]."""
        if router not in self.chosen:
            self.chosen[router] = self._ask(router, x)
        return self.chosen[router]

    def _ask(self, name: str | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if name is None:
            if x.shape not in self._static:
                ids = torch.zeros(*x.shape[:-1], 1, dtype=torch.int32, device=x.device)
                self._static[x.shape] = ids, torch.ones_like(ids, dtype=torch.float32)
            return self._static[x.shape]
        router = self.experts.routers[name]
        if not isinstance(router, TableRouter):
            return router(x)
        fresh, length = self.cache.is_fresh, self.tokens.shape[1]
        mask = self.cache.slots[:length] >= self.cache.padding[:, None] if fresh else None  # [B, T]
        ids, gates = router(self.tokens, None if fresh else self.cache.held, mask)
        if router.holds:
            self._hold(ids[:, -1], gates[:, -1])
        return ids, gates

    def _hold(self, ids: Tensor, gates: Tensor) -> None:
        """Keep the last token's choice [B, k], in buffers that stay where they are: a CUDA graph knows them."""
        if self.cache.held is None:
            self.cache.held = ids.clone(), gates.clone()
        else:
            for kept, now in zip(self.cache.held, (ids, gates), strict=True):
                kept.copy_(now)


class Fused(Routed):
    """Experts beside each linear by `fusedmerge.lora_linear`."""

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        linears = self.experts.linears
        if not any(name in linears for name in names):
            return self.decoder.linears(x, names)
        return [self._adapted(x, name, *self.route(linears[name].router, x)) if name in linears else self._plain(x, name) for name in names]

    def _plain(self, x: Tensor, name: str) -> Tensor:
        return self.decoder.linears(x, (name,))[0]

    def _adapted(self, x: Tensor, name: str, ids: Tensor, gates: Tensor) -> Tensor:
        weights, expert = self.decoder.weights, self.experts.linears[name]
        return lora_linear(x, weights[name], expert.a, expert.b, ids, gates, expert.scaling, weights.get(bias_name(name)))

    def mlp(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        """MixLoRA's gates come after the non-linearity (arXiv 2404.15159, section 3): sum_j g_j expert_j(x), with
        expert(x) = (W_down + s B A)(silu((W_gate + s B A) x) * (W_up + s B A) x). Every (token, expert) pair is a token with one expert."""
        if self.experts.method != "mixlora":
            return super().mlp(x, gate, up, down)
        routers = [self.experts.linears[name].router for name in (gate, up, down) if name in self.experts.linears]
        if not routers:
            return super().mlp(x, gate, up, down)
        ids, gates = self.route(routers[0], x)  # [B, T, k] each
        pairs = x[..., None, :].expand(*ids.shape, -1)  # [B, T, k, hidden]
        one = torch.ones_like(gates)[..., None]  # [B, T, k, 1]

        def expert(into: Tensor, name: str) -> Tensor:
            return self._adapted(into, name, ids[..., None], one) if name in self.experts.linears else self._plain(into, name)

        out = expert(F.silu(expert(pairs, gate)) * expert(pairs, up), down)  # [B, T, k, hidden]
        return (out * gates[..., None].to(out.dtype)).sum(dim=-2)


class Unfused(Fused):
    """Experts beside each linear as plain torch applies them: W x, then the chosen experts' factors gathered and multiplied."""

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        outs = list(self.decoder.linears(x, names))  # packed where they are
        for index, name in enumerate(names):
            if name in self.experts.linears:
                expert = self.experts.linears[name]
                outs[index] = add_unfused(outs[index], x, expert, *self.route(expert.router, x))
        return outs

    def _adapted(self, x: Tensor, name: str, ids: Tensor, gates: Tensor) -> Tensor:
        return add_unfused(self._plain(x, name), x, self.experts.linears[name], ids, gates)


def add_unfused(y: Tensor, x: Tensor, expert: ExpertLinear, ids: Tensor, gates: Tensor) -> Tensor:
    """y [..., out] + sum_j gates_j s_j B_j (A_j x), in x's dtype as PEFT computes it; ids [..., k], gates [..., k] (0 where the id is -1).

    Few tokens: the chosen factors are gathered. Many: every expert is applied to all tokens, with gate 0 where it was not chosen.
    """
    tokens, chosen, count = x.flatten(0, -2), ids.flatten(0, -2).long(), len(expert.a)  # [T, in], [T, k]
    weight = gates.flatten(0, -2) * expert.scaling[chosen]  # [T, k]
    if chosen.numel() <= 2 * count:
        z = expert.a[chosen] @ tokens[:, None, :, None]  # [T, k, r, 1]
        each = (expert.b[chosen] @ z).squeeze(-1)  # [T, k, out]
        delta = (each * weight[..., None].to(each.dtype)).sum(dim=1)  # [T, out]
    else:
        share = torch.zeros(len(tokens), count, dtype=weight.dtype, device=x.device).scatter_add_(1, chosen % count, weight)  # [T, N]
        delta = torch.zeros(len(tokens), expert.b.shape[1], dtype=x.dtype, device=x.device)  # [T, out]
        for index in range(count):
            delta += ((tokens @ expert.a[index].T) @ expert.b[index].T) * share[:, index, None].to(x.dtype)
    return y + delta.reshape(y.shape)
