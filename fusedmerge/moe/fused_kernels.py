"""Strategy `fused` on the kernels of fused application: up to 16 tokens take eight launches a layer, beside rotary positions and attention.

    x -> [norm, router, shrink | q k v] -> attention -> [shrink | o, + x] -> [norm, shrink | gate up] -> [SiLU * up, shrink | down, + x]

A bracket is a group: a prologue and a GEMV (docs/kernels/lora_linear.md). Linears without experts join the group that shares their x; a
group of none needs no prologue, but for its norm or SiLU. Linears with routers of their own share a group where the routers differ in
nothing but their weights and are a part of the prologue; a router that is asked by itself needs a group of its own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fusedmerge.backend import linear
from fusedmerge.backend.kernels import launcher
from fusedmerge.backend.linear import KNOWN, Group, Known, Norm, Silu, Target
from fusedmerge.backend.linear_params import MAX_TOKENS
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.moe.decoder_files import bias_name
from fusedmerge.moe.experts import ExpertLinear, ExpertSet, Routes
from fusedmerge.moe.routing import Router, TableRouter
from fusedmerge.moe.unmerged import Fused
from fusedmerge.ops import route_topk
from fusedmerge.ops.arguments import check_values
from fusedmerge.ops.library import implementation, readable

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.decoder import Cache, Decoder

__all__ = ["FusedKernels", "added_launches", "kernels_for"]

# A layer's linears by the x that they share, and whether it is made by a norm or SiLU.
_SHARING = ((("q_proj", "k_proj", "v_proj"), True), (("o_proj",), False), (("gate_proj", "up_proj"), True), (("down_proj",), True))
_SPARE_BYTES = 2**23  # of A that a fused router may read for nothing: about a launch's time at 3 TB/s (an estimate)


def kernels_for(decoder: Decoder) -> str | None:
    """The backend ("native", "sim", "jit" or "aot") whose kernels run all of the decoder's linears with their experts; None: torch does.

    Raises BackendError for a backend that FUSEDMERGE_BACKEND names and that cannot be used here.
    """
    experts = decoder.experts
    if experts is None:
        return None
    factors = [factor for expert in experts.linears.values() for factor in (expert.a, expert.b)]
    if not readable(*decoder.weights.values(), *factors):
        return None
    most = max((len(expert.a) for expert in experts.linears.values()), default=0)
    slots = max((_num_slots(experts, expert.router, len(expert.a)) for expert in experts.linears.values()), default=0)
    name = implementation("Decoder", most, slots, decoder.head_weight)
    return None if name == "torch" else name


def added_launches(decoder: Decoder, tokens: int = 1) -> int | None:
    """How many launches more a fused step of `tokens` tokens has on the kernels than the backbone's in the same groups.

    They are the prologues that only experts need, and a pair for each further group of linears that share x. A router that is asked by
    itself is not counted: merging asks it, too. None where linears do not run in groups, and `lora_linear` adds one launch for each target.
    """
    experts = decoder.experts
    if experts is None or experts.method == "mixlora" or tokens > MAX_TOKENS or kernels_for(decoder) is None:
        return None
    linears, count = experts.linears, 0
    asked: set[str | None] = set()
    for names in decoder.names:
        for parts, is_made in _SHARING:
            groups = _groups(experts, [names[part] for part in parts], asked)
            needed = [bool(g.fused) or any(linears[name].a.shape[1] for name in g.names if name in linears) for g in groups]
            count += len(groups) + (is_made or needed[0]) + sum(needed[1:]) - (1 + is_made)
            asked.update(linears[names[part]].router for part in parts if names[part] in linears)
    return count


@dataclass
class _Group:
    """Linears of one pair of launches: of one router, or of several that the prologue asks."""

    router: str | None  # of the first linear that has experts
    names: list[str]
    fused: dict[str | None, linear.Router] = field(default_factory=dict)  # by name; empty: asked before, or known
    prepared: Group | None = None

    def takes(self, other: linear.Router) -> bool:
        """Whether one more router may share the launches."""
        return {fused.kind for fused in self.fused.values()} == {other.kind} and (len(self.fused) + 1) * other.k <= MAX_SLOTS


def _groups(experts: ExpertSet, names: Sequence[str], asked: Container[str | None]) -> list[_Group]:
    """The names that share x, as few groups as may be; those without experts in the first. asked: routers that have chosen already."""
    groups: list[_Group] = []
    for router, members in _by_router(experts.linears, names):
        fused = None if router in asked else _fusable(experts, router, members)
        group = next((group for group in groups if fused is not None and group.takes(fused)), None)
        if group is None:
            groups.append(group := _Group(router, []))
        group.names.extend(members)
        if fused is not None:
            group.fused[router] = fused
    return groups


def _by_router(linears: Mapping[str, ExpertLinear], names: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """The names by router (and number of experts), those without experts in the first group."""
    groups: dict[tuple[str | None, int], list[str]] = {}
    for name in names:
        if name in linears:
            groups.setdefault((linears[name].router, len(linears[name].a)), []).append(name)
    plain = [name for name in names if name not in linears]
    if plain:
        groups.setdefault(next(iter(groups), (None, 0)), []).extend(plain)
    return [(router, members) for (router, _), members in groups.items()]


def _num_slots(experts: ExpertSet, name: str | None, num_experts: int) -> int:
    """k of a router; of a function that does not tell it, N."""
    if name is None:
        return 1
    router = experts.routers[name]
    if isinstance(router, TableRouter):
        return int(router.ids.shape[-1])
    chosen = _choice(router)
    return num_experts if chosen is None else chosen[1]


def _choice(router: Routes) -> tuple[Tensor, int, bool] | None:
    """(weight [N, in], k, normalize) of a router that is `route_topk` and nothing more; None for others."""
    if isinstance(router, Router):
        if router.in_features is None or router.top_k is None or (router.top_k == 1 and router.gating == "topk_of_softmax_renormalized"):
            return None
        return router.weight.detach(), router.top_k, router.normalize
    if isinstance(router, partial) and router.func is route_topk and not router.args and {"router_weight", "k"} <= router.keywords.keys():
        return router.keywords["router_weight"].detach(), router.keywords["k"], router.keywords.get("normalize", True)
    return None


def _fusable(experts: ExpertSet, router: str | None, names: Sequence[str]) -> linear.Router | None:
    """The router as a part of its linears' prologue, which then reads A of all N experts; None where it is asked by itself.

    The number of tokens has no say: a token's bits do not depend on its batch.
    """
    choice = None if router is None else _choice(experts.routers[router])
    if choice is None:
        return None
    weight, k, normalize = choice
    factors = [experts.linears[name].a for name in names if name in experts.linears]  # [N, r, in] each
    fits = all(weight.shape == (len(a), a.shape[2]) for a in factors) and 1 <= k <= len(weight)  # else `route_topk` tells why not
    typed = all(weight.dtype in (a.dtype, torch.float32) and weight.device == a.device for a in factors) and weight.stride(-1) == 1
    spare = sum((len(a) - k) * a.shape[1] * a.shape[2] * a.element_size() for a in factors)
    if not (fits and typed) or spare > _SPARE_BYTES:
        return None
    return linear.Router(weight, k, normalize)


class FusedKernels(Fused):
    """Groups of linears in pairs of launches; more tokens than the kernels take go through `fusedmerge.lora_linear`, linear by linear."""

    def __init__(self, decoder: Decoder, backend: str) -> None:
        super().__init__(decoder)
        self._launcher = launcher(backend, decoder.device)
        self._targets = {name: self._target(name) for names in decoder.names for name in names.values()}
        self._num_experts: dict[str | None, int] = {}  # by router: that all of its linears have
        for expert in self.experts.linears.values():
            self._num_experts[expert.router] = min(len(expert.a), self._num_experts.get(expert.router, len(expert.a)))
        self._prepared: dict[tuple[tuple[str, ...], tuple[bool, ...]], list[_Group]] = {}
        self._grouped = False

    def _target(self, name: str) -> Target:
        weights, expert = self.decoder.weights, self.experts.linears.get(name)
        if expert is None:
            return Target(weights[name], bias=weights.get(bias_name(name)))
        return Target(weights[name], expert.a, expert.b, expert.scaling.float().contiguous(), weights.get(bias_name(name)))

    def _ask(self, name: str | None, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, gates = super()._ask(name, x)
        if name is not None and x.device.type == "cpu":
            check_values(ids, gates, self._num_experts[name])
        return ids, gates

    def start(self, tokens: Tensor, cache: Cache) -> None:
        super().start(tokens, cache)
        self._grouped = tokens.numel() <= MAX_TOKENS

    def project_normed(self, x: Tensor, norm: str, names: Sequence[str]) -> Sequence[Tensor]:
        if not self._grouped:
            return super().project_normed(x, norm, names)
        return self._group(x, names, Norm(self.decoder.weights[norm], self.decoder.config.norm_eps))

    def project_added(self, x: Tensor, name: str, stream: Tensor) -> Tensor:
        if not self._grouped:
            return super().project_added(x, name, stream)
        return self._group(x, (name,), stream=stream)[0]

    def feed_forward(self, x: Tensor, norm: str, gate: str, up: str, down: str) -> Tensor:
        """MixLoRA's pairs of a token and an expert have no stream of their own: `Fused.mlp` runs them."""
        if not self._grouped or self.experts.method == "mixlora":
            return super().feed_forward(x, norm, gate, up, down)
        gated, value = self.project_normed(x, norm, (gate, up))  # [B, T, intermediate] each
        return self._group(gated, (down,), Silu(_rows(value)), x)[0]

    def _group(self, x: Tensor, names: Sequence[str], source: Norm | Silu | None = None, stream: Tensor | None = None) -> list[Tensor]:
        """The linears `names` of what `source` makes of x [B, T, in], plus `stream`: a pair of launches for each group among them."""
        batch, rows = x.shape[:-1], _rows(x)
        ys: dict[str, Tensor] = {}
        residual = None if stream is None else _rows(stream)
        for group in self._groups(tuple(names)):
            known = None
            if not group.fused and any(name in self.experts.linears for name in group.names):
                if self._reads(group.router):
                    rows, source = self._made(rows, source), None
                ids, gates = self.route(group.router, rows.unflatten(0, batch))
                known = Known(_rows(ids).to(torch.int32), _rows(gates).float())
            assert group.prepared is not None
            applied = group.prepared.run(self._launcher, rows, known, source, [residual] * len(group.names))
            for name, taken in zip(group.names, applied.routings, strict=True):
                if group.fused and taken is not None:
                    self.chosen[self.experts.linears[name].router] = taken.ids.unflatten(0, batch), taken.gates.unflatten(0, batch)
            rows, source = applied.x, None
            ys |= {name: y.unflatten(0, batch) for name, y in zip(group.names, applied.ys, strict=True)}
        return [ys[name] for name in names]

    def _groups(self, names: tuple[str, ...]) -> list[_Group]:
        """What the linears `names` run in, described once for each set of routers that have chosen before."""
        key = names, tuple(name in self.experts.linears and self.experts.linears[name].router in self.chosen for name in names)
        if key not in self._prepared:
            self._prepared[key] = _groups(self.experts, names, self.chosen)
            for group in self._prepared[key]:
                adapted = [self.experts.linears.get(name) for name in group.names]
                routing = [None if each is None else group.fused.get(each.router, KNOWN) for each in adapted]
                group.prepared = Group([self._targets[name] for name in group.names], routing)
        return self._prepared[key]

    def _reads(self, router: str | None) -> bool:
        """Whether a router has yet to be asked, with x."""
        return router is not None and router not in self.chosen and not isinstance(self.experts.routers[router], TableRouter)

    @staticmethod
    def _made(x: Tensor, source: Norm | Silu | None) -> Tensor:
        """What a prologue makes of x [T, in], by torch, for a router that is asked before."""
        if isinstance(source, Norm):
            return F.rms_norm(x, x.shape[-1:], source.weight, source.epsilon)
        return x if source is None else F.silu(x) * source.up


def _rows(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B T, ...]."""
    return x.flatten(0, 1)
