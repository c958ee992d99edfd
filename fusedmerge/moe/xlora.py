"""X-LoRA (arXiv 2402.07148): a first pass of the bare model, whose last hidden states say how to mix the adapters in a second one.

gates[t] = softmax(MLP(h[t]) / temperature), h the last hidden state of the first pass; y = W x + sum_n gates_n scaling_n B_n (A_n x).
The same gates for all layers, or with `layerwise` other ones for each adapted linear. Needs a transformers model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmerge.errors import InvalidTypeError, InvalidValueError, StateError
from fusedmerge.moe.routing import Owner, Routing, innermost, under_way, wide_precision

if TYPE_CHECKING:
    from fusedmerge.moe.config import LoRAMoEConfig

__all__ = ["XLoRAClassifier", "XLoRAOptions", "first_pass"]

_NOT_IN_FIRST_PASS = ("labels", "use_cache", "past_key_values", "logits_to_keep", "num_items_in_batch", "return_dict", "kwargs")


@dataclass(frozen=True)
class XLoRAOptions:
    """LoRAMoEConfig.xlora, by the names that PEFT's XLoraConfig has for them less their `xlora_`."""

    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    layerwise: bool = False
    softmax: bool = True
    temperature: float = 1.0
    global_scaling: float = 1.0
    bias: bool = True
    relu: bool = True  # between the layers

    @classmethod
    def of(cls, config: LoRAMoEConfig, operation: str) -> XLoRAOptions:
        """Raises InvalidValueError, InvalidTypeError."""
        given: Mapping[str, Any] = config.xlora or {}
        if unknown := set(given) - set(cls.__dataclass_fields__):
            raise InvalidValueError(operation, "xlora", f"options out of {', '.join(cls.__dataclass_fields__)}", sorted(unknown))
        options = cls(**given)
        for name in ("depth", "size"):
            if not isinstance(getattr(options, name), int) or getattr(options, name) < 1:
                raise InvalidValueError(operation, f"xlora: {name}", "an int of at least 1", getattr(options, name))
        return options


class XLoRAClassifier(nn.Module):
    """From hidden states to gates. `depth` linears, with ReLU and dropout between them, as PEFT's."""

    def __init__(self, config: LoRAMoEConfig, names: list[str], hidden_size: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.options = XLoRAOptions.of(config, "inject")
        self.top_k, self.gating, self.num_experts = config.top_k, config.gating, config.max_experts
        self.names = names  # of the adapted linears, in the model's order
        outputs = self.num_experts * (len(names) if self.options.layerwise else 1)
        widths = [hidden_size, *[self.options.size] * (self.options.depth - 1), outputs]
        self.layers = nn.ModuleList()
        for columns, rows in pairwise(widths):
            linear = nn.utils.skip_init(nn.Linear, columns, rows, bias=self.options.bias, device=device)
            for parameter in linear.parameters():  # nn.Linear's own distribution, from our generator
                drawn = torch.empty(parameter.shape, device="cpu").uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
                parameter.data.copy_(drawn)
            self.layers.append(linear)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., d] -> [..., L, N], L = 1 unless layerwise; float32."""
        first: Any = self.layers[0]
        with wide_precision(hidden.device):
            out = first(hidden.to(first.weight.dtype))
            for layer in list(self.layers)[1:]:
                out = torch.relu(out) if self.options.relu else out
                out = layer(nn.functional.dropout(out, self.options.dropout, self.training))
            out = out if out.dtype == torch.float64 else out.float()
            return out.reshape(*hidden.shape[:-1], -1, self.num_experts) / self.options.temperature

    def gates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [..., N] -> ids int32 [..., k], gates [..., k]."""
        chosen, ids = (logits, None) if self.top_k is None else torch.topk(logits, self.top_k, dim=-1)
        if ids is None:
            ids = torch.arange(self.num_experts, device=logits.device).expand(logits.shape)
        if self.options.softmax and self.gating == "topk_of_softmax":
            chosen = torch.softmax(logits, dim=-1).gather(-1, ids)
        elif self.options.softmax:
            chosen = torch.softmax(chosen, dim=-1)
        return ids.to(torch.int32), chosen * self.options.global_scaling

    def forward(self, hidden: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """hidden [..., d] -> (ids [..., k], gates [..., k], logits [..., N]) by router name: "router", or each linear's own."""
        logits = self.logits(hidden)
        names = self.names if self.options.layerwise else ["router"]
        return {name: (*self.gates(logits[..., index, :]), logits[..., index, :]) for index, name in enumerate(names)}


def hidden_size_of(model: nn.Module, operation: str) -> int:
    """Raises InvalidTypeError for what is no transformers model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int) or not isinstance(getattr(model, getattr(model, "base_model_prefix", ""), None), nn.Module):
        raise InvalidTypeError(operation, "model", "a transformers model with hidden states (for xlora)", type(model).__name__)
    return size


def first_pass(owner: Owner, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The bare model's last hidden states [B, T, d] for a forward's arguments, and the arguments for the second pass.

    With a key-value cache the first pass has one of its own, kept on the caller's cache object: its keys and values are the bare model's.
    Raises StateError for a cache whose earlier tokens had no first pass.
    """
    cache, second = own_cache(model, args, kwargs)
    own = {name: value for name, value in arguments(model, args, kwargs).items() if name not in _NOT_IN_FIRST_PASS and value is not None}
    own["use_cache"] = cache is not None
    if cache is not None:
        if not hasattr(cache, "_bare"):
            if cache.get_seq_length() > 0:
                raise StateError("xlora", "past_key_values", "a cache that this model filled from its first token", "another")
            cache._bare = _new_cache(model)
        own["past_key_values"] = cache._bare
    bare = getattr(model, model.base_model_prefix)
    with under_way(Routing(owner, model, innermost(), bare=True)), torch.no_grad():
        hidden: torch.Tensor = bare(**own).last_hidden_state
    return hidden, second


def own_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The key-value cache that a forward will use (None: none), and the argument that makes it use it where it would make its own.

    What a router has to remember from one call to the next of a generation is kept on this object: it lives as long as the tokens count.
    """
    if not hasattr(model, "config"):
        return None, {}
    given = arguments(model, args, kwargs)
    cache = given.get("past_key_values")
    if cache is None and given.get("use_cache", getattr(model.config, "use_cache", False) and not model.training):
        cache = _new_cache(model)
        return cache, {"past_key_values": cache}
    return cache, {}


def arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
