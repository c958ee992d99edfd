"""Which experts each token takes: the routers, and the routing of one forward call.

A Routing is made when the model's forward is called and lives as long as that call, so that a second forward cannot disturb a first one's
backward. A checkpointed region, which autograd runs again by itself, gets what was decided before it as inputs and gives what it decides
as outputs (`Carried`): gradients reach the router through both kinds of checkpointing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fusedmerge.errors import InvalidTypeError, ShapeError, StateError
from fusedmerge.ops import route_topk

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fusedmerge.moe.config import LoRAMoEConfig

__all__ = [
    "Carried",
    "Owner",
    "Record",
    "Router",
    "Routing",
    "TableRouter",
    "checkpoint",
    "current",
    "decide",
    "enter",
    "innermost",
    "leave",
    "outside",
    "under_way",
    "wide_precision",
]


class Owner(Protocol):
    """What routings, layers and blocks need of the `Structure` that they belong to (fusedmerge.moe.structure)."""

    model: nn.Module
    config: LoRAMoEConfig
    places: dict[str, str]

    @property
    def is_suspended(self) -> bool: ...

    def shared_router(self, root: nn.Module, name: str, place: str) -> nn.Module: ...

    def note(self, name: str) -> None: ...


class Record(NamedTuple):
    """What one router decided in one forward. Leading shapes are those of the router's input."""

    name: str
    ids: torch.Tensor  # int32 [..., k]
    gates: torch.Tensor  # float32 [..., k]
    logits: torch.Tensor  # float32 [..., N]


def wide_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from narrowing what is written as float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class Router(nn.Module):
    """Scores N experts for each token and chooses k (LoRA-Switch, arXiv 2405.17741, section 3; the gatings: LoRAMoEConfig).

    weight [N, in], float32. in_features None: set by the first input, where only a forward can tell which linear comes first.
    top_k None: dense, all N in their own order, gates softmax over all.
    """

    weight: nn.Parameter
    every: torch.Tensor

    def __init__(
        self, num_experts: int, in_features: int | None, top_k: int | None, gating: str, std: float, seed: int, device: torch.device
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.gating, self.std, self.seed = num_experts, top_k, gating, std, seed
        self.register_buffer("every", torch.arange(num_experts, dtype=torch.int32, device=device), persistent=False)
        if in_features is None:
            lazy: nn.Parameter = nn.UninitializedParameter(device=device, dtype=torch.float32)  # type: ignore[call-arg, assignment]
            self.weight = lazy
        else:
            self.weight = nn.Parameter(self._drawn(in_features).to(device))

    @property
    def in_features(self) -> int | None:
        """None as long as no input has told it."""
        return None if isinstance(self.weight, nn.UninitializedParameter) else int(self.weight.shape[1])

    def _drawn(self, in_features: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.num_experts, in_features, generator=generator, device="cpu") * self.std

    def materialise(self, in_features: int) -> None:
        """Set the width of a router that had none yet. The Parameter stays the same object, so optimisers keep it."""
        if isinstance(self.weight, nn.UninitializedParameter):
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be trained later
                self.weight.materialize((self.num_experts, in_features))
                self.weight.copy_(self._drawn(in_features))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., in] -> ids int32 [..., k], gates float32 [..., k] (float64 for float64 x). Nothing waits for the device."""
        self._check(x)
        with wide_precision(x.device):
            if self.top_k is None:
                return self.every.expand(*x.shape[:-1], self.num_experts), torch.softmax(self.logits(x), dim=-1)
            ids, gates = route_topk(x, self.weight, self.top_k, normalize=self.normalize)
            if self.gating == "topk_of_softmax_renormalized" and self.top_k == 1:
                gates = gates / gates  # 1, without a gradient
            return ids, gates

    @property
    def normalize(self) -> bool:
        """`route_topk`'s: the k largest of a softmax over all, divided by their sum, are the softmax over them."""
        return self.gating != "topk_of_softmax"

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., N], float32 (float64 for float64 x)."""
        self._check(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with wide_precision(x.device):
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, torch.Tensor) and not is_lazy(given) and given.dim() == 2:
            self.materialise(int(given.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check(self, x: torch.Tensor) -> None:
        if self.in_features is None:
            self.materialise(int(x.shape[-1]))
        if x.shape[-1] != self.in_features:
            raise ShapeError("Router", "x", f"[..., {self.in_features}]", list(x.shape))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, top_k={self.top_k}, gating={self.gating}"


class TableRouter(nn.Module):
    """Fixed experts for each token id: no training, and known before the forward.

    ids int32 [V, k] (-1: none), gates float32 [V, k]: row v is for token id v. holds: tokens that do not steer keep the choice of the last
    token before them that does, so that a control token decides for what follows it; steers bool [V].
    """

    ids: torch.Tensor
    gates: torch.Tensor
    steers: torch.Tensor

    def __init__(self, ids: torch.Tensor, gates: torch.Tensor, holds: bool = False) -> None:
        super().__init__()
        self.holds = holds
        self.register_buffer("ids", ids.to(torch.int32))
        self.register_buffer("gates", gates.to(torch.float32))
        self.register_buffer("steers", torch.ones(len(ids), dtype=torch.bool, device=ids.device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TableRouter:
        gates = self.gates
        super()._apply(fn, recurse)
        self.gates = gates.to(self.gates.device)  # float32 whatever the model becomes
        return self

    def forward(
        self, input_ids: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor] | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids [..., T] -> ids int32 [..., T, k], gates float32 [..., T, k]. held: what earlier tokens left, [..., k] each.
        mask [..., T]: 0 for padding, which does not steer."""
        ids = self.ids[input_ids]
        gates = torch.where(ids >= 0, self.gates[input_ids], 0.0)
        if not self.holds:
            return ids, gates
        places = torch.arange(input_ids.shape[-1], device=input_ids.device)
        steers = self.steers[input_ids] if mask is None else self.steers[input_ids] & mask.bool()
        last = torch.where(steers, places, -1).cummax(dim=-1).values[..., None]  # [..., T, 1]; -1: none yet
        before = (
            (-torch.ones_like(ids[..., :1, :]), torch.zeros_like(gates[..., :1, :])) if held is None else (t[..., None, :] for t in held)
        )
        at = last.clamp_min(0).expand(ids.shape)
        ids, gates = (torch.where(last >= 0, now.gather(-2, at), then) for now, then in zip((ids, gates), before, strict=True))
        return ids, gates


class Routing:
    """The routing of one forward call.

    decided: router name -> (ids, gates), for routers that several layers share; under ANY for all routers of the call.
    records: what each router decided, kept where a loss or a caller wants it (`keeps`).
    last: how many tokens at the end the model's output layer is given (transformers' logits_to_keep); 0: all.
    bare: adapted linears act as plain ones in this call.
    """

    ANY = "*"

    def __init__(
        self,
        owner: Owner,
        root: nn.Module,
        parent: Routing | None = None,
        *,
        mask: torch.Tensor | None = None,
        keeps: bool = False,
        last: int = 0,
        bare: bool = False,
    ) -> None:
        self.owner, self.root, self.parent = owner, root, parent
        self.mask, self.keeps, self.last, self.bare = mask, keeps, last, bare
        self.decided: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.records: list[Record] = []

    def branch(self, decided: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Routing:
        """The same call's routing for a region that may run again: what was decided before it, and no records yet."""
        inner = Routing(self.owner, self.root, self.parent, mask=self.mask, keeps=self.keeps, last=self.last, bare=self.bare)
        inner.decided = dict(decided)
        return inner

    def route(self, name: str, x: torch.Tensor, router: nn.Module | None, place: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, gates) for the tokens of x [..., in]. router: the caller's own; None: the shared one called `name`, which the first
        caller's input is for. Raises StateError where that caller (`place`) is not the one of earlier forwards."""
        if (forced := self.decided.get(self.ANY)) is not None and _repeats(forced[0].shape[:-1], x.shape[:-1]):
            return forced[0].expand(*x.shape[:-1], -1), forced[1].expand(*x.shape[:-1], -1)
        if (found := forced or self.decided.get(name)) is not None:
            return self._fitted(found, x, place)
        shared = router is None
        if router is None:
            router = self.owner.shared_router(self.root, name, place)
            first = self.owner.places.setdefault(name, place)
            if first != place:
                hint = "call the whole model; a checkpointed part through fusedmerge.moe.checkpoint"
                raise StateError("route", f"router {name}", f"{first} to run first, as before ({hint})", place)
        ids, gates = router(x)
        if shared:
            self.decided[name] = (ids, gates)
        if self.keeps and isinstance(router, Router):
            self.records.append(Record(name, ids, gates, router.logits(x)))
        return ids, gates

    def _fitted(self, found: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, place: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, gates = found
        routed, tokens = ids.shape[:-1], x.shape[:-1]
        if routed == tokens:
            return ids, gates
        if routed.numel() == tokens.numel() and 1 in (len(routed), len(tokens)):  # flattened; [B, T] as [T, B] would be other tokens
            return ids.reshape(*tokens, -1), gates.reshape(*tokens, -1)
        if self.last and routed[:1] == tokens[:1] and tokens[1:] == (self.last,) and len(routed) == 2:
            return ids[:, -self.last :], gates[:, -self.last :]
        raise ShapeError("route", place, f"the {list(routed)} tokens that were routed", list(tokens))


def _repeats(shape: torch.Size, tokens: torch.Size) -> bool:
    """Whether `shape` broadcasts to the tokens'."""
    return len(shape) <= len(tokens) and all(n in (1, m) for n, m in zip(shape[::-1], tokens[::-1], strict=False))


_THREAD = threading.local()  # torch.compile follows its attributes, and neither a subclass of it nor a context variable


def outside(owner: Owner) -> Routing | None:
    """What is under way around a forward of `owner`'s model that begins. A forward of the same model is none: it was interrupted by
    what torch calls no hook for (KeyboardInterrupt), and is over."""
    leave(owner)
    return innermost()


def innermost() -> Routing | None:
    """The routing of the innermost forward of any injected model that is under way in this thread."""
    return getattr(_THREAD, "routing", None)


def current(owner: Owner) -> Routing | None:
    """The routing of the innermost forward of `owner`'s model that is under way in this thread."""
    routing = innermost()
    while routing is not None and routing.owner is not owner:
        routing = routing.parent
    return routing


@contextmanager
def under_way(routing: Routing | None) -> Iterator[None]:
    """Make `routing` the current one."""
    outer = innermost()
    _THREAD.routing = routing
    try:
        yield
    finally:
        _THREAD.routing = outer


def enter(routing: Routing) -> None:
    """Begin a forward: `routing` is current until `leave`. It must have the present one as its parent."""
    assert routing.parent is innermost()
    _THREAD.routing = routing


def leave(owner: Owner) -> Routing | None:
    """End `owner`'s forward, whatever state an exception has left inside it; its routing (None if none is under way)."""
    routing = current(owner)
    if routing is not None:
        _THREAD.routing = routing.parent
    return routing


def decide(owner: Owner, name: str, x: torch.Tensor, router: nn.Module | None, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [..., k], gates [..., k]) for the tokens of x [..., in], as `Routing.route`, in whichever forward is under way."""
    routing = current(owner)
    if routing is None:
        if router is not None:
            ids, gates = router(x)
            return ids, gates
        routing = Routing(owner, owner.model)  # a part of the model, called by itself
    return routing.route(name, x, router, place)


class Carried:
    """A checkpoint function, `run(function, *args, **options)`, whose region takes its routing in and gives it back as tensors."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        outer = innermost()
        if outer is None:
            return self.run(function, *args, **options)
        names = list(outer.decided)
        given = [tensor for name in names for tensor in outer.decided[name]]
        made: dict[str, Any] = {}

        def region(*inputs: Any) -> tuple[Any, ...]:
            pairs = zip(inputs[0 : len(given) : 2], inputs[1 : len(given) : 2], strict=True)
            inner = outer.branch(dict(zip(names, pairs, strict=True)))
            with under_way(inner):
                result = function(*inputs[len(given) :])
            fresh = {name: pair for name, pair in inner.decided.items() if name not in names}
            results = result if isinstance(result, tuple) else (result,)
            made.update(single=not isinstance(result, tuple), results=len(results), fresh=list(fresh))
            made["records"] = [record.name for record in inner.records]
            return (*results, *(t for pair in fresh.values() for t in pair), *(t for record in inner.records for t in record[1:]))

        outputs = self.run(region, *given, *args, **options)
        results, rest = outputs[: made["results"]], list(outputs[made["results"] :])
        for name in made["fresh"]:
            outer.decided[name] = (rest.pop(0), rest.pop(0))
        for name in made["records"]:
            outer.records.append(Record(name, rest.pop(0), rest.pop(0), rest.pop(0)))
        return results[0] if made["single"] else results


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **options: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` for a part of an injected model (transformers' own checkpointing needs nothing of it).

    Arguments for `function` are positional. Raises InvalidTypeError.
    """
    from torch.utils.checkpoint import checkpoint as run

    if not callable(function):
        raise InvalidTypeError("checkpoint", "function", "a callable", type(function).__name__)
    return Carried(run)(function, *args, use_reentrant=use_reentrant, **options)
