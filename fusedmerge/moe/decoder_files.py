"""What the reference decoder reads from a checkpoint: its shape (config.json) and its weights (safetensors), all used or refused."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import shorten
from fusedmerge.errors import FormatError, ShapeError

if TYPE_CHECKING:
    import torch

__all__ = ["ATTENTION", "MLP", "DecoderConfig", "check_weights", "linear_names", "read_checkpoint"]

_OP = "Decoder"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry; computed here


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a Llama, Mistral or Qwen2 model."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Mapping[str, Any]  # rope_theta, rope_type ("default", "linear", "llama3") and its parameters
    windows: tuple[int | None, ...]  # per layer: how many positions back a token sees, itself included; None: all
    tied: bool  # the LM head is the embedding
    attention_bias: tuple[str, ...]  # of ATTENTION: the linears with a bias
    mlp_bias: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From config.json's content. Raises FormatError for an architecture or option that the decoder does not compute."""
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise FormatError(_OP, "model_type", " or ".join(ARCHITECTURES), repr(kind))
        architectures = config.get("architectures")
        if architectures and architectures != [ARCHITECTURES[kind]]:
            raise FormatError(_OP, "architectures", [ARCHITECTURES[kind]], architectures)
        _require(config, "hidden_act", "silu", ("silu", "swish", None))
        heads, layers = _count(config, "num_attention_heads"), _count(config, "num_hidden_layers")
        bias = bool(config.get("attention_bias"))
        return cls(
            vocab=_count(config, "vocab_size"),
            hidden=_count(config, "hidden_size"),
            intermediate=_count(config, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
            head_dim=_count(config, "head_dim") if config.get("head_dim") else _count(config, "hidden_size") // heads,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            windows=_windows(config, kind, layers),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=ATTENTION[:3] if kind == "qwen2" else ATTENTION if kind == "llama" and bias else (),
            mlp_bias=MLP if kind == "llama" and config.get("mlp_bias") else (),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint, by name."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = {"q_proj": (query, self.hidden), "k_proj": (kv, self.hidden), "v_proj": (kv, self.hidden), "o_proj": (self.hidden, query)}
        linears |= {"gate_proj": (self.intermediate, self.hidden), "up_proj": (self.intermediate, self.hidden)}
        linears |= {"down_proj": (self.hidden, self.intermediate)}
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
            for part, name in linear_names(layer).items():
                found[name] = linears[part]
                if part in self.attention_bias + self.mlp_bias:
                    found[bias_name(name)] = linears[part][:1]
        return found

    def inverse_frequencies(self) -> torch.Tensor:
        """Rotary frequencies, float32 [head_dim / 2]; "llama3" stretches the long waves only (transformers' modeling_rope_utils)."""
        import torch

        rope = self.rope
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        plain = 1.0 / rope["rope_theta"] ** exponents
        if rope["rope_type"] == "default":
            return plain
        if rope["rope_type"] == "linear":
            return plain / rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength, context = 2 * math.pi / plain, rope["original_max_position_embeddings"]
        share = ((context / wavelength - low) / (high - low)).clamp(0, 1)  # 1: a short wave, as it is
        return (1 - share) * plain / rope["factor"] + share * plain


def linear_names(layer: int) -> dict[str, str]:
    """The weights of one layer's linears: {"q_proj": "model.layers.0.self_attn.q_proj.weight", ...}."""
    names = {part: f"model.layers.{layer}.self_attn.{part}.weight" for part in ATTENTION}
    return names | {part: f"model.layers.{layer}.mlp.{part}.weight" for part in MLP}


def bias_name(weight: str) -> str:
    """The bias beside a weight."""
    return weight.removesuffix("weight") + "bias"


def _require(config: Mapping[str, Any], field: str, expected: object, accepted: tuple[object, ...]) -> None:
    if config.get(field) not in accepted:
        raise FormatError(_OP, field, expected, repr(config.get(field)))


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(_OP, field, "a whole number of at least 1", repr(value))
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; earlier ones rope_theta and rope_scaling."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **given}
    rope["rope_type"] = given.get("rope_type", given.get("type", "default"))
    needed = {"default": (), "linear": ("factor",)}
    needed |= {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needed:
        raise FormatError(_OP, "rope_type", " or ".join(needed), repr(rope["rope_type"]))
    _require({"partial_rotary_factor": 1.0, **config, **rope}, "partial_rotary_factor", 1.0, (1.0, None))
    for field in ("rope_theta", *needed[rope["rope_type"]]):
        if isinstance(rope.get(field), bool) or not isinstance(rope.get(field), (int, float)):
            raise FormatError(_OP, f"rope_parameters: {field}", "a number", repr(rope.get(field)))
    return rope


def _windows(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    """Mistral's window holds for all layers; Qwen2's for those that layer_types (or max_window_layers) names."""
    window = config.get("sliding_window")
    if window is None or kind == "llama" or (kind == "qwen2" and not config.get("use_sliding_window")):
        return (None,) * layers
    window = _count(config, "sliding_window")
    if kind == "mistral":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", layers)
        types = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise FormatError(_OP, "layer_types", f"{layers} of full_attention and sliding_attention", types)
    return tuple(window if entry == "sliding_attention" else None for entry in types)


# ---------------------------------------------------------------------- weights


def check_weights(config: DecoderConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is there, in its shape, and none besides. Raises FormatError and ShapeError."""
    shapes = config.shapes()
    if missing := shapes.keys() - found.keys():
        raise FormatError(_OP, "checkpoint", f"{len(shapes)} tensors", f"no {shorten(missing)}")
    tied = {"lm_head.weight"} if config.tied else set()
    unknown = {name for name in found.keys() - shapes.keys() - tied if not name.endswith(_IGNORED)}
    if unknown:
        raise FormatError(_OP, "checkpoint", "only tensors that the decoder uses", shorten(unknown))
    for name, shape in shapes.items():
        if tuple(found[name]) != shape:
            raise ShapeError(_OP, name, list(shape), list(found[name]))


def read_checkpoint(
    directory: str | os.PathLike[str], dtype: torch.dtype | None, device: torch.device
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """The configuration and the weights, cast to `dtype` (None: the configuration's own) on `device`.

    Raises MissingFileError; FormatError for a checkpoint that is damaged, lacks a tensor, has one too many or is of another architecture.
    """
    import torch

    from fusedmerge.checkpoint.files import open_base

    base = open_base(directory, _OP)
    config = DecoderConfig.of(base.config)
    check_weights(config, {name: entry.shape for name, entry in base.tensors.items()})
    stated = getattr(torch, str(base.config.get("dtype") or base.config.get("torch_dtype")), None)
    wanted = dtype or (stated if isinstance(stated, torch.dtype) else None)
    shapes = config.shapes()
    weights = {}
    for name, tensor in _tensors(base.shards, base.directory):
        if name in shapes:
            if not tensor.is_floating_point():
                raise FormatError(_OP, name, "floats", tensor.dtype)
            weights[name] = tensor.to(device, wanted or tensor.dtype)
    if len({weight.dtype for weight in weights.values()}) > 1:
        raise FormatError(_OP, "checkpoint", "one dtype (or dtype=...)", sorted({str(weight.dtype) for weight in weights.values()}))
    return config, weights


def _tensors(shards: Mapping[str, Any], directory: os.PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for shard in shards:
        with safe_open(os.path.join(directory, shard), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, file.get_tensor(name)
