"""PEFT's LoRA configuration: which fields a merge can honour, and the rank and scaling of each module.

A delta is only scaling * B A. Whatever else a configuration asks for would merge silently wrong, so every field that is set must
be known, and known not to change the delta or the base weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fusedmerge.errors import FormatError

__all__ = ["LoraRule", "check_fields", "flag"]

T = TypeVar("T")

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")  # eva, orthogonal and mica choose A and B; the base stays untouched


def _changes_base(init: object) -> bool:
    """Whether this initialisation may subtract from, or quantise, the base. A converted adapter has the field reset to true."""
    return isinstance(init, str) and init.lower() not in _HARMLESS_INITS


# Refused when the predicate holds: field -> (predicate, what is accepted and why nothing else is).
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (bool, "false: DoRA rescales the rows of base + delta"),
    "lora_bias": (bool, "false: the bias of lora_B would be lost"),
    "bias": (lambda value: value not in (None, "none"), '"none": the trained biases would be lost'),
    "modules_to_save": (bool, "null: the fully trained modules would be lost"),
    "trainable_token_indices": (bool, "null: the trained token rows would be lost"),
    "target_parameters": (bool, "null: LoRA on expert parameters [experts, out, in] is not supported"),
    "init_lora_weights": (
        _changes_base,
        f"an initialisation that leaves the base as it is ({', '.join(_BASE_CHANGING_INITS)} change it: convert the adapter with "
        "path_initial_model_for_weight_conversion)",
    ),
    "layer_replication": (bool, "null: the layers are copies that share one base weight"),
    "ensure_weight_tying": (bool, "false: an adapter on tied weights would be applied twice, or to one of them only"),
    "alora_invocation_tokens": (bool, "null: aLoRA acts on the tokens after an invocation only"),
    "use_qalora": (bool, "false: QALoRA pools its input"),
    "use_bdlora": (bool, "null: BD-LoRA stores block-diagonal factors"),
    "arrow_config": (bool, "null: Arrow mixes adapters for each token"),
    "kasa_config": (bool, "null: KaSA truncates the base and scales the rank dimension"),
    "monteclora_config": (bool, "null: MonteCLoRA samples its factors"),
    "velora_config": (bool, "null: VeLoRA is not supported"),
    "enable_lora": (bool, "null: LoRA on slices of a merged projection is not supported"),
}

# Read below, or without influence on scaling * B A: where modules are looked for, how A and B began, training, bookkeeping.
# fmt: off
_KNOWN = frozenset(
    (
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "qalora_group_size", "megatron_config", "megatron_core", "runtime_config", "task_type", "auto_mapping",
        "peft_version", "base_model_name_or_path", "revision", "inference_mode", "merge_weights",
    )
)
# fmt: on


def check_fields(config: Mapping[str, Any], operation: str, known: frozenset[str] = frozenset()) -> None:
    """Raises `FormatError` naming the first field that would merge silently wrong, or that is set and not known."""
    for name, value in config.items():
        if name in _REFUSED:
            refuses, accepted = _REFUSED[name]
            if refuses(value):
                raise FormatError(operation, name, accepted, _show(value))
        elif value and name not in _KNOWN and name not in known:
            raise FormatError(operation, name, "null, or a field this version knows (it may name a LoRA variant)", _show(value))


def _show(value: object, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def flag(config: Mapping[str, Any], name: str, operation: str) -> bool:
    """A boolean field; absent and null are false."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise FormatError(operation, name, "true or false", _show(value))
    return bool(value)


@dataclass(frozen=True)
class LoraRule:
    """The rank and the scaling of every module, by PEFT's rule."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def of(cls, config: Mapping[str, Any], operation: str) -> LoraRule:
        """Reads `r`, `lora_alpha`, `use_rslora`, `rank_pattern` and `alpha_pattern`; `FormatError` names one of the wrong type."""
        return cls(
            _rank(config.get("r"), "r", operation),
            _alpha(config.get("lora_alpha"), "lora_alpha", operation),
            flag(config, "use_rslora", operation),
            _pattern(config, "rank_pattern", _rank, operation),
            _pattern(config, "alpha_pattern", _alpha, operation),
        )

    def scale(self, module: str) -> tuple[int, float]:
        """(rank, scaling) of a module: alpha / r, or alpha / sqrt(r) with rslora, where r and alpha may come from a pattern."""
        rank = _match(self.rank_pattern, module, self.r)
        alpha = _match(self.alpha_pattern, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first key that matches the end of the module's name as a regular expression (or equals it)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return pattern.get(module, default)


def _pattern(config: Mapping[str, Any], name: str, parse: Callable[[object, str, str], T], operation: str) -> dict[str, T]:
    patterns = config.get(name)
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        raise FormatError(operation, name, "an object of module patterns", _show(patterns))
    for key in patterns:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise FormatError(operation, name, "regular expressions", f"{key!r}: {error}") from error
    return {key: parse(value, f"{name}[{key!r}]", operation) for key, value in patterns.items()}


def _rank(value: object, name: str, operation: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise FormatError(operation, name, "a positive integer", _show(value))
    return value


def _alpha(value: object, name: str, operation: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e30:  # nan and inf fail it too
        raise FormatError(operation, name, "a finite number", _show(value))
    return float(value)
