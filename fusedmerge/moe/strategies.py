"""How a decoder's linears are applied: plain, with experts beside them, or with experts merged into them.

| strategy | a decoded token costs, beside the backbone | paper (arXiv 2405.17741) |
|---|---|---|
| backbone | nothing; no experts | - |
| unfused | router, gathers and two small GEMMs per adapted linear, in plain torch | what dynamic adapters do, section 2 |
| merged-simple | each adapted weight read, changed and written by torch's GEMM, linear by linear | "simple merge" of the ablation |
| merged | one switch of all adapted weights in one launch | the method, section 3 |
| fused | the chosen experts' bytes (`fusedmerge.lora_linear`) | - |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fusedmerge.backend.cpu import exact_products
from fusedmerge.errors import StateError
from fusedmerge.moe.decoder_files import bias_name
from fusedmerge.moe.experts import ExpertLinear
from fusedmerge.moe.routing import TableRouter
from fusedmerge.ops import lora_linear
from fusedmerge.switcher import Switcher

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.decoder import Cache, Decoder

__all__ = ["MERGED", "STRATEGIES", "UNMERGED", "Apply", "add_unfused", "make", "one_route"]

UNMERGED = ("backbone", "unfused", "fused")
MERGED = ("merged-simple", "merged")
STRATEGIES = (*UNMERGED, *MERGED, "auto")
GATE_TOLERANCE = 1e-5  # how far equal rows of a batch may come apart in the router's float32 GEMM


def make(decoder: Decoder, strategy: str) -> Apply:
    """The strategy of that name (all but "auto"). Raises StateError where the decoder has no experts, or they cannot be merged."""
    if strategy != "backbone" and decoder.experts is None:
        raise StateError("Decoder", "experts", f'some, for strategy "{strategy}"', "a plain backbone")
    kinds = {"backbone": Apply, "unfused": Unfused, "fused": Fused, "merged-simple": MergedSimple, "merged": Merged}
    return kinds[strategy](decoder)


class Apply:
    """Strategy `backbone`, and what the others build on."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def start(self, tokens: Tensor, cache: Cache) -> None:
        """A forward of tokens [B, T] begins."""

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """The linears `names`, which share x [B, T, in]: [B, T, out] each."""
        return self.decoder.linears(x, names)

    def mlp(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        """down(silu(gate x) * up x), [B, T, hidden]."""
        gated, value = self.project(x, (gate, up))  # [B, T, intermediate] each
        return self.project(F.silu(gated) * value, (down,))[0]

    def restore(self) -> None:
        """Make the weights what they were."""

    def close(self) -> None:
        """Restore, for good."""
        self.restore()


class _Routed(Apply):
    """Experts chosen in the forward: each router is asked once, where it is first met."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        assert decoder.experts is not None
        self.experts = decoder.experts
        self.chosen: dict[str | None, tuple[Tensor, Tensor]] = {}
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


class Fused(_Routed):
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


def one_route(ids: Tensor, gates: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """The route [k] that a whole batch [B, 1, k] shares. For B > 1 this waits for the device. Raises StateError where rows differ."""
    if len(ids) > 1:
        same = (ids == ids[:1]).all() & ((gates - gates[:1]).abs() <= GATE_TOLERANCE).all()
        if not bool(same):
            expected = f'one route for the whole batch (strategy "{strategy}" merges it into the weights; "fused" and "unfused" need none)'
            raise StateError("generate", "routes", expected, f"{len(torch.unique(ids.flatten(1), dim=0))} or more in a batch of {len(ids)}")
    return ids[0, 0], gates[0, 0].float()


class _Merging(_Routed):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        if self.experts.method == "mixlora":
            expected = 'experts that are linear in the output (strategy "fused" or "unfused" runs these)'
            raise StateError("Decoder", "method", expected, "mixlora, whose gates come after the non-linearity")


class MergedSimple(_Merging):
    """Each adapted weight is set to round(base + sum gate * scaling * B A) just before it is used, with torch's own GEMM.

    From a pristine copy, as the Switcher does it, so that errors do not add up; a router per linear is as good as one for all.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.base = {name: decoder.weights[name].clone() for name in self.experts.linears}

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        for name in names:
            if name in self.base:
                expert = self.experts.linears[name]
                merge_simple(
                    self.decoder.weights[name], self.base[name], expert, *one_route(*self.route(expert.router, x), "merged-simple")
                )
        return self.decoder.linears(x, names)

    def restore(self) -> None:
        for name, base in self.base.items():
            self.decoder.weights[name].copy_(base)


@torch.no_grad()
def merge_simple(live: Tensor, base: Tensor, expert: ExpertLinear, ids: Tensor, gates: Tensor) -> None:
    """live [out, in] = round(base + sum_j gates_j s_j B_j A_j), ids and gates [k] (0 where the id is -1)."""
    wide = torch.promote_types(live.dtype, torch.float32)
    ids = ids.long()
    a = expert.a[ids].to(wide).flatten(0, 1)  # [k r, in]
    b = expert.b[ids].to(wide) * (gates * expert.scaling[ids])[:, None, None]  # [k, out, r]
    with exact_products():
        live.copy_(torch.addmm(base.to(wide), b.transpose(0, 1).flatten(1), a))


class Merged(_Merging):
    """One switch of all adapted weights per token, at the first adapted linear; from there on the plain backbone."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        if not self.experts.mergeable:
            expected = 'one route per token for all linears (strategy "fused", "unfused" or "merged-simple" runs these)'
            raise StateError("Decoder", "routers", expected, f"{len(self.experts.routers)} routers ({self.experts.method})")
        self.switcher = Switcher({name: decoder.weights[name] for name in self.experts.linears}, self.experts.make_bank())
        self.router = next(iter(self.experts.linears.values())).router

    def project(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        if not self.chosen and any(name in self.experts.linears for name in names):
            self.switcher.switch(*one_route(*self.route(self.router, x), "merged"))
        return self.decoder.linears(x, names)

    def restore(self) -> None:
        self.switcher.restore()

    def close(self) -> None:
        self.switcher.close()
