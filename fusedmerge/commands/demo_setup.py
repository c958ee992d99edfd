"""Small models and adapters by transformers and PEFT, and PEFT's own way to switch them: what the demo and the benchmarks run on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "DemoConfig",
    "ModelSize",
    "Stage",
    "PeftSwitch",
    "build_llama",
    "clone",
    "lora_layers",
    "peft_load",
    "weights_of",
    "write_adapters",
]


@dataclass(frozen=True)
class ModelSize:
    """A Llama's size."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int


MODEL = ModelSize(hidden=256, intermediate=688, layers=4, heads=4, vocab=1024)


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is, and what it shows."""

    model: ModelSize = MODEL
    switches: int = 1000
    tokens: int = 50  # decoded by each method
    delta: float = 0.07  # |delta| / |W| of each adapter
    shown: tuple[tuple[str, float], ...] = (("math", 0.7), ("chat", 0.3))  # the mixture whose weights and logits are compared
    seed: int = 0


@dataclass
class Stage:
    """What the demo's steps share."""

    config: DemoConfig
    out: Path
    base: PreTrainedModel
    adapters: dict[str, Path]  # name -> PEFT directory
    progress: Callable[[str], Any] = field(default=lambda _: None)

    @property
    def shown(self) -> dict[str, float]:
        """The mixture whose weights and logits are compared."""
        return dict(self.config.shown)


def build_llama(size: ModelSize, seed: int = 0, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A random Llama, bfloat16 unless told otherwise, with transformers' own initialisation."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.heads, vocab_size=size.vocab, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: PreTrainedModel = LlamaForCausalLM(config)
    return torch.nn.Module.to(model, dtype or torch.bfloat16).eval()


def write_adapters(
    base: PreTrainedModel, directory: Path, configs: Mapping[str, Mapping[str, Any]], delta: float, seed: int = 0
) -> dict[str, Path]:
    """Make adapters with PEFT, give each |delta|/|W| of `delta` on every target, and save them: {name: directory/name}."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = list(configs)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(**configs[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LoraConfig(**configs[name]))
    with torch.no_grad():
        for layer in lora_layers(wrapped):
            norm = float(layer.get_base_layer().weight.float().norm())
            for name, b in layer.lora_B.items():
                a = layer.lora_A[name].weight
                a.uniform_(-(a.shape[1] ** -0.5), a.shape[1] ** -0.5)  # as PEFT, but with all of float32's bits
                spread = float(a.norm()) * abs(layer.scaling[name]) * math.sqrt(b.weight.shape[0])
                b.weight.normal_(0.0, delta * norm / spread)
    wrapped.save_pretrained(str(directory), selected_adapters=names)
    return {name: directory / name for name in names}


def lora_layers(model: torch.nn.Module) -> list[Any]:
    """PEFT's adapted layers."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def peft_load(base: PreTrainedModel, paths: Mapping[str, Path], **kwargs: Any) -> PeftModel:
    """A copy of the base with the saved adapters, loaded by PEFT."""
    from peft import PeftModel

    first, *others = paths
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(paths[first]), adapter_name=first, **kwargs)
    for name in others:
        model.load_adapter(str(paths[name]), adapter_name=name, **kwargs)
    return model.eval()


class PeftSwitch:
    """A mixture switch by PEFT's own means: unmerge_adapter, gates by set_scale, merge_adapter."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self._layers = lora_layers(model)
        self._merged = False

    def switch(self, mixture: Mapping[str, float]) -> None:
        """Set the mixture."""
        self.restore()
        for layer in self._layers:
            for name, gate in mixture.items():
                layer.set_scale(name, gate)
        self.model.merge_adapter(adapter_names=list(mixture))
        self._merged = True

    def restore(self) -> None:
        """Take the mixture out."""
        if self._merged:
            self.model.unmerge_adapter()
            self._merged = False


def weights_of(model: torch.nn.Module, targets: Sequence[str]) -> dict[str, torch.Tensor]:
    """The model's own tensors of `targets`."""
    from fusedmerge.weights import collect

    found = collect(model, "demo")
    return {name: found[name].tensor.detach() for name in targets}


def clone(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: tensor.clone() for name, tensor in weights.items()}
