"""One generation of a transformers model, by its own forward and its own KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fusedmerge.backend.kernels import Launcher, launcher
from fusedmerge.backend.linear import KNOWN, Group, Known, Target
from fusedmerge.backend.linear_params import MAX_TOKENS
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.errors import InvalidTypeError, StateError
from fusedmerge.moe.experts import ExpertLinear
from fusedmerge.moe.layers import MoELinear
from fusedmerge.moe.routing import TableRouter
from fusedmerge.moe.strategies import MERGED, add_unfused, merge_simple, one_route
from fusedmerge.moe.structure import find
from fusedmerge.ops import group_once, lora_linear
from fusedmerge.ops.arguments import check_values
from fusedmerge.ops.library import implementation, readable
from fusedmerge.switcher import Switcher
from fusedmerge.weights import check_writable, collect

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelSession"]

_OP = "generate"


class ModelSession:
    """Prefill, then step after step, with one strategy. A context manager: on exit the model is as it was, in weights and in mode."""

    def __init__(self, model: torch.nn.Module, strategy: str) -> None:
        self.model = model
        self.structure = find(model)
        self.factors = {} if self.structure is None else {part: _factors(part) for part in self.structure.linears.values()}
        self.strategy = strategy
        self._check()
        self._accepted = inspect.signature(model.forward).parameters
        self._switcher: Switcher | None = None
        self._fused = _Fused()
        self._base: dict[MoELinear, Tensor] = {}
        self._cache: Any = None
        self._mask = torch.empty(0)

    def prefill(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """The logits [B, V] after tokens [B, T], of which the first `padding` [B] positions of each row are empty. Starts anew."""
        self._restore()
        self._cache = None
        slots = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        first = torch.zeros_like(tokens[:, :1]) if padding is None else padding[:, None]  # [B, 1]
        self._mask = (slots >= first).long()  # [B, T]
        with self._unmerged("fused" if self.strategy in MERGED else self.strategy):
            return self._forward(tokens, (slots - first).clamp_min(0))

    def step(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after one more token [B] of each row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        positions = self._mask.sum(dim=1, keepdim=True) - 1  # [B, 1]
        with self._merged(tokens[:, None]) if self.strategy in MERGED else self._unmerged(self.strategy):
            return self._forward(tokens[:, None], positions)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self._accepted}
        with group_once():
            out = self.model(input_ids=tokens, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **options)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise InvalidTypeError(_OP, "model", "a causal language model with a KV cache", type(self.model).__name__)
        return out.logits[:, -1]

    # ------------------------------------------------------------------ strategies

    def _check(self) -> None:
        if self.strategy == "backbone":
            return
        if self.structure is None:
            raise StateError(_OP, "model", f'one that inject has adapted, for strategy "{self.strategy}"', "a plain one")
        method = self.structure.config.method
        can = {"merged": ("lora_switch", "lora"), "merged-simple": ("lora_switch", "lora", "mola", "moral", "molora", "loramoe")}
        if method not in can.get(self.strategy, (method,)):
            raise StateError(
                _OP, "strategy", f'"fused" or "unfused" for {method}', f'"{self.strategy}" (for {", ".join(can[self.strategy])})'
            )
        if self.strategy in MERGED:  # a tied weight would be merged twice, or carry the mixture to where there is none
            shapes = {name: (part.out_features, part.in_features) for name, part in self.structure.linears.items()}
            check_writable(shapes, collect(self.model, _OP), _OP)

    @contextmanager
    def _unmerged(self, strategy: str) -> Iterator[None]:
        if self.structure is None:
            yield
        elif strategy == "backbone":
            with self.structure.suspended():
                yield
        else:
            with _applied_by(self.factors, _unfused if strategy == "unfused" else self._fused):
                yield

    @contextmanager
    def _merged(self, tokens: Tensor) -> Iterator[None]:
        """Plain linears on weights that are merged where the forward first meets them. tokens [B, 1]."""
        assert self.structure is not None
        table = next((router for router in self.structure.routers.values() if isinstance(router, TableRouter)), None)
        known = None if table is None else self._look_up(table, tokens)
        with self.structure.suspended(), ExitStack() as hooks:
            parts = list(self.structure.linears.values())  # in execution order, which the prefill has shown
            for part in parts[:1] if self.strategy == "merged" else parts:

                def before(module: Any, args: tuple[Any, ...]) -> None:
                    ids, gates = module.route(args[0]) if known is None else known
                    self._merge(module, *one_route(ids, gates, self.strategy))

                hooks.callback(part.register_forward_pre_hook(before).remove)
            yield

    def _look_up(self, table: TableRouter, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Such a router reads the token itself; what a control token decided stands on the model's KV cache, as in its own forward."""
        ids, gates = table(tokens, getattr(self._cache, "_held", None))
        if table.holds:
            self._cache._held = ids[:, -1], gates[:, -1]
        return ids, gates

    def _merge(self, part: MoELinear, ids: Tensor, gates: Tensor) -> None:
        assert self.structure is not None
        if self.strategy == "merged":
            if self._switcher is None:
                self._switcher = Switcher(self.model, self.structure.bank())
            self._switcher.switch(ids, gates)
            return
        live = part.base_layer.weight.detach()
        if part not in self._base:
            self._base[part] = live.clone()
        merge_simple(live, self._base[part], self.factors[part], ids, gates)

    # ------------------------------------------------------------------ life

    def __enter__(self) -> ModelSession:
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True
        self._restore()
        if self._switcher is not None:
            self._switcher.close()

    def _restore(self) -> None:
        for part, base in self._base.items():
            part.base_layer.weight.detach().copy_(base)
        if self._switcher is not None:
            self._switcher.restore()


def _factors(part: MoELinear) -> ExpertLinear:
    """One linear's experts in its weight's dtype, cast once: at each token that would cost more than the experts do."""
    dtype = part.base_layer.weight.dtype
    return ExpertLinear(part.lora_A.detach().to(dtype), part.lora_B.detach().to(dtype), part.scaling, None)


# ---------------------------------------------------------------------- experts beside a linear

Applied = Callable[[MoELinear, ExpertLinear, "Tensor", "Tensor", "Tensor"], "Tensor"]


class _Fused:
    """`lora_linear` for one session: its kernels take few tokens without the operator in between, from a group that is described once."""

    def __init__(self) -> None:
        self._groups: dict[MoELinear, tuple[Launcher, Group] | None] = {}

    def __call__(self, part: MoELinear, experts: ExpertLinear, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        layer, k = part.base_layer, ids.shape[-1]
        if part not in self._groups:
            self._groups[part] = self._prepare(layer, experts)
        prepared = self._groups[part]
        fits = x.dtype == layer.weight.dtype and x.shape == (*ids.shape[:-1], layer.weight.shape[1]) and gates.shape == ids.shape
        if prepared is None or not fits or x.numel() > MAX_TOKENS * x.shape[-1] or k > MAX_SLOTS or type(x) is not torch.Tensor:
            return lora_linear(x, layer.weight, experts.a, experts.b, ids, gates, experts.scaling, layer.bias)
        if x.device.type == "cpu":
            check_values(ids, gates, len(experts.a))
        where, group = prepared
        known = Known(ids.reshape(-1, k).to(torch.int32), gates.reshape(-1, k).float())
        y = group.run(where, x.reshape(-1, x.shape[-1]).contiguous(), known).ys[0]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _prepare(layer: torch.nn.Linear, experts: ExpertLinear) -> tuple[Launcher, Group] | None:
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        name = implementation(_OP, len(experts.a), 1, weight, experts.a, *([] if bias is None else [bias]))
        if name == "torch" or torch.is_autocast_enabled(weight.device.type) or not readable(weight, experts.a, experts.b, bias):
            return None
        scaling = experts.scaling.float().contiguous()
        return launcher(name, weight.device), Group([Target(weight, experts.a, experts.b, scaling, bias)], [KNOWN])


def _unfused(part: MoELinear, experts: ExpertLinear, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    return add_unfused(part.base_layer(x), x, experts, ids, gates)


@contextmanager
def _applied_by(factors: Mapping[MoELinear, ExpertLinear], function: Applied) -> Iterator[None]:
    """Inside, every linear computes its mixture by `function` from factors that were cast before."""

    def each(part: MoELinear, experts: ExpertLinear, x: Tensor, ids: Tensor) -> Tensor:
        pairs = x if x.dim() > ids.dim() else x[..., None, :].expand(*ids.shape, -1)  # [..., k, in]
        return function(part, experts, pairs, ids[..., None], torch.ones(1, device=x.device).expand(*ids.shape, 1))

    for part, experts in factors.items():
        part.__dict__.update(mixed=partial(function, part, experts), each=partial(each, part, experts))
    try:
        yield
    finally:
        for part in factors:
            del part.__dict__["mixed"], part.__dict__["each"]
