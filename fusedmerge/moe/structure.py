"""Structure: what `inject` made of a model. Its parts, its bank, and how its routing is watched, forced or switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmerge.bank import AdapterBank
from fusedmerge.errors import DtypeError, InvalidTypeError, ShapeError, StateError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.moe import losses
from fusedmerge.moe.blocks import MixLoRABlock
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.layers import Experts, MoELinear
from fusedmerge.moe.routing import Carried, Record, Router, Routing, TableRouter, current, enter, leave, outside
from fusedmerge.moe.xlora import XLoRAClassifier, arguments, first_pass, own_cache

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Structure", "aux_loss", "find", "injected", "structure"]

_ATTRIBUTE = "_fusedmerge_moe"
_CHECKPOINTING = "_gradient_checkpointing_func"  # transformers' layers hold what they checkpoint themselves with


def find(model: nn.Module) -> Structure | None:
    """What `inject` made of `model`; a wrapper's (DDP's, torch.compile's) is that of the model inside. None: nothing."""
    found = getattr(model, _ATTRIBUTE, None)
    for name in ("module", "_orig_mod"):
        if found is None and isinstance(getattr(model, name, None), nn.Module):
            found = getattr(getattr(model, name), _ATTRIBUTE, None)
    return found if isinstance(found, Structure) else None


def injected(model: nn.Module, operation: str) -> Structure:
    """As `find`. Raises StateError, in the name of `operation`, where there is nothing."""
    found = find(model)
    if found is None:
        raise StateError(operation, "model", "a model that fusedmerge.moe.inject has adapted", type(model).__name__)
    return found


def structure(model: nn.Module) -> Structure:
    """What `inject` made of `model`. Raises StateError where there is nothing."""
    return injected(model, "structure")


def aux_loss(model: nn.Module) -> torch.Tensor:
    """The weighted auxiliary loss of the model's last forward: a scalar, differentiable, as it was added to outputs.loss.

    The forward must have been made with gradients on, with labels, or inside `structure(model).recording()`: others keep no logits.
    Raises StateError.
    """
    found = injected(model, "aux_loss")
    if found.last_loss is None:
        raise StateError("aux_loss", "model", "a forward before it, with gradients on, with labels or in recording()", "none")
    return found.last_loss()


class Structure:
    """Made by `inject`; found by `structure(model)`."""

    def __init__(self, model: nn.Module, config: LoRAMoEConfig) -> None:
        self.model = model
        self.config = config
        self.places: dict[str, str] = {}  # shared router -> the linear whose input it reads
        self.last_loss: Callable[[], torch.Tensor] | None = None  # of the last forward that kept what it takes: see aux_loss
        self._experts: dict[str, Experts] = {}  # canonical module name -> linear or block
        self._blocks: dict[str, MixLoRABlock] = {}
        self._order: dict[str, None] = {}  # canonical module names, as they ran
        self._suspended = 0
        self._recorders: list[list[Record]] = []
        self._forced: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._task_types: list[torch.Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], object]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the model: all but what belongs to a call that is over or under way."""
        return self.__dict__ | {"last_loss": None, "_recorders": [], "_forced": [], "_task_types": [], "_suspended": 0}

    @property
    def linears(self) -> dict[str, MoELinear]:
        """Canonical weight name -> layer, in execution order as far as a forward has shown it (the first linear: from `inject` on,
        for a transformers model)."""
        first = [name for name in self.places.values() if name in self._experts]
        names = dict.fromkeys([*first, *self._order, *self._experts] if len(self.places) == 1 else [*self._order, *self._experts])
        return {f"{name}.weight": part for name in names if isinstance(part := self._experts[name], MoELinear)}

    @property
    def parts(self) -> Mapping[str, Experts]:
        """Canonical module name -> what holds experts there: MoELinear or PESCBlock."""
        return self._experts

    @property
    def routers(self) -> dict[str, nn.Module]:
        """By name: shared ones by their own name or their layer's, others by the module that they route."""
        shared = getattr(self.model, "lora_routers", None)
        found = {name.replace("/", "."): router for name, router in shared.items()} if shared is not None else {}
        own: dict[str, nn.Module] = {name: part.router for name, part in self._experts.items() if part.router is not None}
        return found | own | {name: block.router for name, block in self._blocks.items()}

    def shared_router(self, root: nn.Module, name: str, place: str) -> nn.Module:
        """A shared router of `root`, which is the model or a data-parallel replica of it. Raises StateError where a forward of the whole
        model would have decided before `place` runs."""
        routers: Any = getattr(root, "lora_routers", {})
        key = name.replace(".", "/")
        if key not in routers or not isinstance(routers[key], Router):
            raise StateError(
                "route", place, f"a forward of the whole model, or of the block around it ({self.config.method})", "a part of it"
            )
        return routers[key]

    def bank(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AdapterBank:
        """The experts of all linears as adapters ("expert_0", ... or config.expert_names), copied; the one of "lora", and the plain LoRA
        beside a method's experts, as "static". device, dtype: each weight's own by default.

        Raises StateError where experts cannot be merged (mixlora, pesc).
        """
        if not self.config.traits.mergeable:
            got = f"{self.config.method}'s, with a non-linearity between them"
            raise StateError("bank", "model", "experts that are linear in their layer's input", got)
        adapters = [Adapter(name, self._factors(e, static=False)) for e, name in enumerate(self.config.names)]
        adapters.append(Adapter("static", self._factors(0, static=True)))
        return AdapterBank.from_adapters([adapter for adapter in adapters if adapter.targets], self.model, device, dtype, operation="bank")

    def _factors(self, expert: int, static: bool) -> dict[str, Factors]:
        return {
            name: Factors(linear.lora_A[expert].detach(), linear.lora_B[expert].detach(), float(linear.scaling[expert]))
            for name, linear in self.linears.items()
            if linear.static is static and expert < linear.num_experts
        }

    @property
    def is_suspended(self) -> bool:
        if self._suspended:
            return True
        routing = current(self)
        return routing is not None and routing.bare

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, every adapted linear and block acts as what it was before: for weights that a Switcher has merged."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Yields a list that gets each router's Record (name, ids, gates, logits) of every forward that ends inside, in order."""
        records: list[Record] = []
        self._recorders.append(records)
        try:
            yield records
        finally:
            self._recorders = [other for other in self._recorders if other is not records]

    @contextmanager
    def forced(self, ids: torch.Tensor, gates: torch.Tensor) -> Iterator[None]:
        """Inside, every token takes the given experts, whatever the routers say. ids int [..., k] (-1: none), gates float [..., k]; leading
        shape as the tokens of a forward, or 1 where it repeats. Raises InvalidTypeError, ShapeError, DtypeError."""
        for field, tensor in (("ids", ids), ("gates", gates)):
            if not isinstance(tensor, torch.Tensor):
                raise InvalidTypeError("forced", field, "a tensor", type(tensor).__name__)
            if tensor.is_floating_point() == (field == "ids"):
                raise DtypeError("forced", field, "int32" if field == "ids" else "float32", tensor.dtype)
        if ids.shape != gates.shape or ids.dim() < 1:
            raise ShapeError("forced", "gates", f"that of ids, {list(ids.shape)}", list(gates.shape))
        self._forced.append((ids.to(torch.int32), torch.where(ids >= 0, gates, 0.0)))
        try:
            yield
        finally:
            self._forced.pop()

    @contextmanager
    def task_types(self, types: torch.Tensor) -> Iterator[None]:
        """Inside, the samples of a batch have these task types [B]: for LoRAMoE's constraint (config.expert_types)."""
        self._task_types.append(types)
        try:
            yield
        finally:
            self._task_types.pop()

    def note(self, name: str) -> None:
        """A linear runs: its place in the execution order."""
        if name not in self._order:
            self._order[name] = None

    def attach(self) -> None:
        """Hook the model's forward."""
        setattr(self.model, _ATTRIBUTE, self)
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._handles = [before, after]

    def detach(self) -> None:
        """Give the model back as it was before `inject`."""
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        for module in self.model.modules():
            if isinstance(run := module.__dict__.get(_CHECKPOINTING), Carried):
                setattr(module, _CHECKPOINTING, run.run)
        delattr(self.model, _ATTRIBUTE)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        config, given = self.config, _given(model, args, kwargs)
        if model.training and torch.is_grad_enabled():
            _carry_checkpoints(model)
        wanted = bool(config.balance_loss_coef and config.balance_loss != "none") or config.z_loss_coef > 0
        wanted = wanted and (torch.is_grad_enabled() or given.get("labels") is not None)
        mask, last = given.get("attention_mask"), given.get("logits_to_keep")
        routing = Routing(
            self,
            model,
            outside(self),
            mask=mask if isinstance(mask, torch.Tensor) else None,
            keeps=wanted or bool(self._recorders),
            last=last if isinstance(last, int) else 0,
        )
        if self._forced:
            routing.decided[Routing.ANY] = self._forced[-1]
        elif not self.is_suspended:
            kwargs = kwargs | self._decide_beforehand(routing, args, kwargs)
        enter(routing)
        return args, kwargs

    def _decide_beforehand(self, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a table or X-LoRA's first pass decides before the forward; the arguments that the forward is to have besides its own."""
        routers: Any = getattr(routing.root, "lora_routers", {})
        router = routers["router"] if "router" in routers else None  # noqa: SIM401 (a ModuleDict has no get)
        if isinstance(router, TableRouter):
            input_ids = _input_ids(args, kwargs)
            cache, more = own_cache(routing.root, args, kwargs) if router.holds else (None, {})
            ids, gates = routing.decided["router"] = router(input_ids, getattr(cache, "_held", None), _latest(routing.mask, input_ids))
            if cache is not None:
                cache._held = ids[..., -1, :], gates[..., -1, :]
            return more
        if not isinstance(router, XLoRAClassifier):
            return {}
        hidden, more = first_pass(self, routing.root, args, kwargs)
        for name, (ids, gates, logits) in router(hidden).items():
            routing.decided[name] = (ids, gates)
            if routing.keeps:
                routing.records.append(Record(name, ids, gates, logits))
        return more

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        routing = leave(self)
        if routing is None or output is None:
            return None
        for recorder in self._recorders:
            recorder.extend(routing.records)
        self.last_loss = None
        if routing.keeps or torch.is_grad_enabled():
            task_types = self._task_types[-1] if self._task_types else None
            self.last_loss = partial(losses.total_loss, routing.records, self.config, routing.mask, task_types, _device(model))
        if _given(model, args, kwargs).get("labels") is None or self.last_loss is None or not routing.records:
            return None
        return _with_loss(output, self.last_loss())


def _carry_checkpoints(model: nn.Module) -> None:
    """transformers' layers checkpoint themselves with a function that they hold: let it carry the routing."""
    for module in model.modules():
        run = module.__dict__.get(_CHECKPOINTING)
        if run is not None and not isinstance(run, Carried):
            setattr(module, _CHECKPOINTING, Carried(run))


def _given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments by name; of those without one the first needs none."""
    return arguments(model, args, kwargs) if len(args) > 1 else kwargs


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    given = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(given, torch.Tensor) or given.is_floating_point():
        raise StateError("table router", "model", "a forward with input_ids", type(given).__name__)
    return given


def _latest(mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """The part of a mask [B, earlier + T] that is for tokens [B, T]; None for a mask of another form."""
    if mask is None or mask.dim() != 2 or tokens.dim() != 2 or mask.shape[1] < tokens.shape[1]:
        return None
    return mask[:, -tokens.shape[1] :]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _with_loss(output: Any, loss: torch.Tensor) -> Any:
    """The output with the auxiliary loss added to its own; as it is where it has none."""
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        is_loss = bool(output) and isinstance(output[0], torch.Tensor) and output[0].dim() == 0
        return (output[0] + loss.to(output[0].device), *output[1:]) if is_loss else output
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        total = own + loss.to(own.device, own.dtype)
        if isinstance(output, dict):  # as transformers' outputs are
            output["loss"] = total
        else:
            output.loss = total
    return output
