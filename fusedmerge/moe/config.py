"""LoRAMoEConfig: what a LoRA-MoE model is made of. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusedmerge.errors import FormatError, InvalidTypeError, InvalidValueError

__all__ = ["BALANCE_LOSSES", "GATINGS", "METHODS", "LoRAMoEConfig", "Method"]

_OPERATION = "LoRAMoEConfig"


class Method(NamedTuple):
    """What a method is, and its paper's defaults."""

    place: str  # of its routers: "model" (one), "layer", "block" (an MLP), "linear", "none"
    num_experts: int | tuple[int, ...]
    top_k: int | None  # None: dense
    r: int
    lora_alpha: float
    lora_dropout: float
    gating: str
    balance_loss: str
    balance_loss_coef: float
    mergeable: bool  # its experts are linear in x, so that a mixture can be merged into W
    experts_in: str = "all"  # "mlp": targets elsewhere get one plain LoRA


METHODS: Mapping[str, Method] = {
    "lora_switch": Method("model", 8, 2, 16, 32.0, 0.0, "softmax_of_topk", "switch", 0.01, True),
    "mola": Method("linear", (2, 4, 6, 8), 2, 8, 16.0, 0.0, "topk_of_softmax_renormalized", "switch", 0.01, True),
    "moral": Method("layer", 8, 2, 16, 32.0, 0.0, "softmax_of_topk", "switch", 0.01, True),
    "pesc": Method("block", 8, 2, 64, 64.0, 0.1, "softmax_of_topk", "mixtral", 0.01, False, "mlp"),
    "mixlora": Method("block", 8, 2, 16, 32.0, 0.0, "softmax_of_topk", "mixtral", 0.001, False, "mlp"),
    "loramoe": Method("linear", 6, None, 4, 32.0, 0.0, "softmax_of_topk", "cv2", 0.1, True, "mlp"),
    "molora": Method("linear", 8, None, 4, 4.0, 0.0, "softmax_of_topk", "none", 0.0, True),
    "xlora": Method("model", 8, None, 16, 32.0, 0.0, "topk_of_softmax", "none", 0.0, True),
    "lora": Method("none", 1, 1, 16, 32.0, 0.0, "softmax_of_topk", "none", 0.0, True),
}
GATINGS = ("softmax_of_topk", "topk_of_softmax", "topk_of_softmax_renormalized")
BALANCE_LOSSES = ("switch", "mixtral", "cv2", "none")
_ALWAYS_DENSE = ("loramoe",)


@dataclass(frozen=True)
class LoRAMoEConfig:
    """A LoRA-MoE model. What is None takes the method's own default (`METHODS`), so that every field is set once the object is made.

    method: "lora_switch", "mola", "moral", "pesc", "mixlora", "loramoe", "molora", "xlora" or "lora" (docs/moe.md has the formulas).
    num_experts: N; or a list, one entry for each layer, or for each of as many equal groups of layers, by depth (not where one router
        serves all layers). "lora" has one expert and "loramoe" is dense, whatever num_experts and top_k say.
    top_k: k experts per token; None for "molora" and "xlora" is dense.
    r, lora_alpha, lora_dropout, init_lora_weights (True: B = 0; False: random; "gaussian"), use_rslora,
        target_modules ("all-linear", a list of name endings, a regular expression for whole names): as PEFT means them.
    gating: "softmax_of_topk": over the k chosen logits (k = 1: over all, since a renormalised single gate would be constant);
        "topk_of_softmax": over all, then the k largest as they are; "topk_of_softmax_renormalized": then divided by their sum.
    router: "learned"; "lora_switch" also has "table", fixed experts for each token id, and "control", held for the tokens that follow.
    router_init_std: of the normal distribution that a router starts from.
    balance_loss: "switch" (minimum 1), "mixtral" (minimum k), "cv2" or "none"; see fusedmerge.moe.losses. Added to outputs.loss with
        balance_loss_coef, and the z-loss with z_loss_coef.
    train_experts: False freezes the experts (a router is trained on top of them).
    expert_names: N names; "expert_0", ... by default.
    expert_types: "loramoe" only: each expert's task type, for its localized balance constraint.
    xlora: "xlora" only: its classifier's options (fusedmerge.moe.xlora).

    Raises InvalidTypeError, InvalidValueError.
    """

    method: str = "lora_switch"
    num_experts: int | tuple[int, ...] | Sequence[int] | None = None
    top_k: int | None = None
    r: int | None = None
    lora_alpha: float | None = None
    target_modules: str | tuple[str, ...] | Sequence[str] = "all-linear"
    lora_dropout: float | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    gating: str | None = None
    router: str = "learned"
    router_init_std: float = 0.02
    balance_loss: str | None = None
    balance_loss_coef: float | None = None
    z_loss_coef: float = 0.0
    train_experts: bool = True
    expert_names: tuple[str, ...] | Sequence[str] | None = None
    expert_types: tuple[int, ...] | Sequence[int] | None = None
    xlora: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        traits = METHODS[self.method]
        for name in ("num_experts", "top_k", "r", "lora_alpha", "lora_dropout", "gating", "balance_loss", "balance_loss_coef"):
            if getattr(self, name) is None:
                self._set(name, getattr(traits, name))
        for name in ("num_experts", "target_modules", "expert_names", "expert_types"):
            value = getattr(self, name)
            if isinstance(value, (list, set, frozenset)):
                self._set(name, tuple(sorted(value) if isinstance(value, (set, frozenset)) else value))
        if self.method == "lora":
            self._set("num_experts", 1)
            self._set("top_k", 1)
        if self.method in _ALWAYS_DENSE:
            self._set("top_k", None)
        self._check(traits)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check(self, traits: Method) -> None:
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        for field, value in (("r", self.r), ("top_k", 1 if self.top_k is None else self.top_k), *(("num_experts", n) for n in counts)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(
                    _OPERATION, field, "an int" + (" (or a list of them)" if field == "num_experts" else ""), repr(value)
                )
            if value < 1:
                raise InvalidValueError(_OPERATION, field, "at least 1", value)
        if not counts:
            raise InvalidValueError(_OPERATION, "num_experts", "at least one entry", "an empty list")
        if isinstance(self.num_experts, tuple) and traits.place in ("model", "none") and len(set(counts)) > 1:
            raise InvalidValueError(_OPERATION, "num_experts", f"one number ({self.method} has one router)", list(counts))
        if self.top_k is not None and self.top_k > self.min_experts:
            raise InvalidValueError(_OPERATION, "top_k", f"at most num_experts ({self.min_experts})", self.top_k)
        for field, least, most in (
            ("lora_alpha", -math.inf, math.inf),
            ("lora_dropout", 0.0, 1.0),
            ("router_init_std", 0.0, math.inf),
            ("balance_loss_coef", 0.0, math.inf),
            ("z_loss_coef", 0.0, math.inf),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidTypeError(_OPERATION, field, "a number", repr(value))
            if not math.isfinite(value) or not least <= value <= most or (field == "lora_dropout" and value == 1):
                raise InvalidValueError(_OPERATION, field, f"a finite number of at least {least} and below {most}", value)
        for field in ("use_rslora", "train_experts"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidTypeError(_OPERATION, field, "a bool", repr(getattr(self, field)))
        _one_of("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        _one_of("gating", self.gating, GATINGS)
        _one_of("balance_loss", self.balance_loss, BALANCE_LOSSES)
        _one_of("router", self.router, ("learned", "table", "control") if self.method == "lora_switch" else ("learned",))
        self._check_names(counts)

    def _check_names(self, counts: tuple[Any, ...]) -> None:
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(targets, tuple) or not all(isinstance(name, str) for name in targets):
            raise InvalidTypeError(_OPERATION, "target_modules", '"all-linear", a list of names or a regular expression', repr(targets))
        if not targets or not all(targets):
            raise InvalidValueError(_OPERATION, "target_modules", "at least one name, none of them empty", list(targets))
        for field, kind in (("expert_names", str), ("expert_types", int)):
            values = getattr(self, field)
            if values is None:
                continue
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise InvalidTypeError(_OPERATION, field, f"a list of {kind.__name__}", repr(values))
            if len(values) != max(counts) or (field == "expert_names" and len(set(values)) != len(values)):
                raise InvalidValueError(_OPERATION, field, f"one for each of {max(counts)} experts, names each once", list(values))
        if self.expert_types is not None and self.method != "loramoe":
            raise InvalidValueError(_OPERATION, "expert_types", 'None (only "loramoe" has them)', list(self.expert_types))
        if self.xlora is not None and (self.method != "xlora" or not isinstance(self.xlora, Mapping)):
            raise InvalidValueError(_OPERATION, "xlora", 'None, or a mapping for the method "xlora"', repr(self.xlora))

    @property
    def traits(self) -> Method:
        return METHODS[self.method]

    @property
    def min_experts(self) -> int:
        """The smallest N of any layer."""
        return min(self.num_experts) if isinstance(self.num_experts, tuple) else int(self.num_experts)  # type: ignore[arg-type]

    @property
    def max_experts(self) -> int:
        """The largest N of any layer."""
        return max(self.num_experts) if isinstance(self.num_experts, tuple) else int(self.num_experts)  # type: ignore[arg-type]

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        assert self.r is not None and self.lora_alpha is not None
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.expert_names) if self.expert_names is not None else tuple(f"expert_{e}" for e in range(self.max_experts))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], operation: str = "LoRAMoEConfig.from_dict") -> LoRAMoEConfig:
        """A configuration from `to_dict`'s form. Raises FormatError for fields that there are not, and as the class does."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise FormatError(operation, "config", f"the fields of LoRAMoEConfig ({', '.join(sorted(known))})", ", ".join(unknown))
        return cls(**values)


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise InvalidValueError(_OPERATION, field, f"one of {', '.join(map(str, allowed))}", repr(value))
