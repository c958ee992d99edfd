"""Adapters that live in a PEFT model: their factors are the model's own tensors, not copies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import FormatError, InvalidTypeError, StateError
from fusedmerge.formats.lora import Adapter, Factors
from fusedmerge.formats.peft_config import check_fields
from fusedmerge.formats.tensors import make_factors
from fusedmerge.weights import canonical_name

if TYPE_CHECKING:
    import torch

__all__ = ["read_peft_model"]

_OPERATION = "read_peft_model"
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant")  # they choose B at initialisation; the delta is scaling * B A


def read_peft_model(model: torch.nn.Module) -> list[Adapter]:
    """The LoRA adapters of a `PeftModel` (or of a model that PEFT injected adapters into), in the model's order.

    Factors are detached views of the live tensors, A [r, in] and B [out, r], on the model's device; the scaling is the live one.
    A base that an initialisation changed (PiSSA and the like) is fine here: the live base is the one the factors were made for.

    Raises `InvalidTypeError` where there are no adapters, `StateError` where one is merged into the base, and `FormatError`, naming
    the field or the module, where scaling * B A is not the whole of an adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise InvalidTypeError(_OPERATION, "model", "a model with PEFT adapters (peft_config)", type(model).__name__)
    fields = {name: _check_config(name, config) for name, config in configs.items()}
    targets: dict[str, dict[str, Factors]] = {name: {} for name in configs}
    for prefix, module in model.named_modules():
        _check_wrapper(prefix, module)
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            for name, factors in _layer_factors(prefix, module):
                targets[name][canonical_name(prefix + ".weight")] = factors
    for name, found in targets.items():
        if not found:
            raise FormatError(_OPERATION, name, "LoRA factors on at least one module", "none")
    return [Adapter(name, found, fields[name]) for name, found in targets.items()]


def _check_config(name: str, config: Any) -> dict[str, Any]:
    """The configuration as a dict, with `init_lora_weights` unchecked: the base is the live one."""
    fields: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    kind = getattr(config, "peft_type", None)
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise FormatError(_OPERATION, f"{name}: peft_type", "LORA", repr(kind))
    check_fields({key: value for key, value in fields.items() if key != "init_lora_weights"}, _OPERATION)
    return fields


def _check_wrapper(prefix: str, module: torch.nn.Module) -> None:
    """Refuses modules that PEFT trains in full (`modules_to_save`) or in part (trainable tokens)."""
    if any(parent.__name__ == "AuxiliaryTrainingWrapper" for parent in type(module).__mro__):
        raise FormatError(_OPERATION, prefix, "LoRA only", f"{type(module).__name__}: its trained weights would be lost")


def _layer_factors(prefix: str, module: Any) -> Iterator[tuple[str, Factors]]:
    """(adapter name, factors) of one LoRA layer."""
    _check_layer(prefix, module)
    transposed = bool(getattr(module, "fan_in_fan_out", False))  # per module, set by PEFT from the class: Conv1D or not
    for name in module.lora_A:
        sides = {side: (f"{prefix}.lora_{side}.{name}", getattr(module, f"lora_{side}")[name].weight) for side in "AB"}
        yield name, make_factors(prefix, sides, (None, _scaling(prefix, module, name)), transposed, _OPERATION)
    for name in module.lora_embedding_A:
        sides = {side: (f"{prefix}.lora_embedding_{side}.{name}", getattr(module, f"lora_embedding_{side}")[name]) for side in "AB"}
        yield name, make_factors(prefix, sides, (None, _scaling(prefix, module, name)), True, _OPERATION)


def _check_layer(prefix: str, module: Any) -> None:
    kind = type(module).__name__
    if kind in ("ParamWrapper", "MultiheadAttention"):
        raise FormatError(_OPERATION, prefix, "LoRA on a module with one weight", f"{kind}, which adapts a bare parameter")
    if module.merged:
        raise StateError(_OPERATION, prefix, "a pristine base (call unmerge_adapter first)", f"{module.merged_adapters} merged into it")
    for name, variant in getattr(module, "lora_variant", {}).items():
        if type(variant).__name__ not in _PLAIN_VARIANTS:
            raise FormatError(_OPERATION, prefix, "plain LoRA", f"{type(variant).__name__} in adapter {name!r}")
    biased = [name for name, on in getattr(module, "lora_bias", {}).items() if on]
    if biased:
        raise FormatError(_OPERATION, prefix, "no lora_bias", f"one in adapter {biased[0]!r}")


def _scaling(prefix: str, module: Any, name: str) -> float:
    scaling = float(module.scaling[name])
    if not math.isfinite(scaling):
        raise FormatError(_OPERATION, f"{prefix}.scaling[{name!r}]", "a finite number", scaling)
    return scaling
