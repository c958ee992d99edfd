"""The reference decoder: Llama, Mistral and Qwen2 in one file, in the manner of gpt-fast.

What it computes is transformers' model; how its linears are applied is a strategy's choice (`fusedmerge.moe.strategies`): the plain
backbone, experts beside each linear, or experts merged into it. Shapes: B sequences, T tokens of each, S positions of the cache, L layers,
H query heads, K key heads, D their width, V the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from fusedmerge.checks import usable_device
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, ShapeError
from fusedmerge.moe.decoder_files import DecoderConfig, bias_name, check_weights, linear_names, read_checkpoint
from fusedmerge.moe.experts import ExpertSet
from fusedmerge.moe.strategies import UNMERGED, make
from fusedmerge.ops import group_once
from fusedmerge.weights import collect

if TYPE_CHECKING:
    from torch import Tensor

    from fusedmerge.moe.unmerged import Apply

__all__ = ["Cache", "Decoder"]

_OP = "Decoder"
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that read the same x


class Cache:
    """Keys and values of one generation, allocated once, with the rotary tables for its positions."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
        config = decoder.config
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)  # [L, B, K, S, D]
        self.values = torch.zeros_like(self.keys)  # [L, B, K, S, D]
        self.padding = torch.zeros(batch, dtype=torch.int64, device=decoder.device)  # [B], positions at the left that hold no token
        self.slots = torch.arange(capacity, device=decoder.device)  # [S]
        self.is_fresh = True  # what comes is a prompt
        self.held: tuple[Tensor, Tensor] | None = None  # ids and gates [B, k] that a control token has left for those after it
        angles = torch.outer(torch.arange(capacity).float(), config.inverse_frequencies())  # [S, D / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [S, D]
        self.cos, self.sin = (table.to(decoder.device, decoder.dtype) for table in (angles.cos(), angles.sin()))  # [S, D]

    @property
    def capacity(self) -> int:
        """S."""
        return int(self.keys.shape[3])


class Decoder:
    """A causal language model over a dict of weights, with an optional mixture of LoRA experts beside its linears.

    weights: all tensors of the checkpoint by their names there, in one dtype on one device. experts: the adapted linears' experts and
    their routers. packed: q/k/v and gate/up become slices of one matrix each, so that a plain step has three GEMMs fewer per layer.
    Weights are used where they are (packing copies those that it packs); a merging strategy writes into them and restores them.
    """

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, Tensor], experts: ExpertSet | None = None, *, packed: bool = False
    ) -> None:
        check_weights(config, {name: tuple(weight.shape) for name, weight in weights.items()})
        self.config = config
        self.weights = {name: weights[name].detach() for name in config.shapes()}
        first = self.weights["model.embed_tokens.weight"]
        self.dtype, self.device = first.dtype, first.device
        for name, weight in self.weights.items():
            if weight.dtype != self.dtype:
                raise DtypeError(_OP, name, self.dtype, weight.dtype)
            if weight.device != self.device:
                raise DeviceError(_OP, name, self.device, weight.device)
        self.names = [linear_names(layer) for layer in range(config.layers)]
        self.head_weight = first if config.tied else self.weights["lm_head.weight"]  # [V, hidden]
        self.packed: dict[str, tuple[Tensor, Tensor | None]] = {}  # by the first linear's name
        if packed:
            for names in self.names:
                for parts in PACKED:
                    self._pack([names[part] for part in parts])
        self.experts = experts
        if experts is not None:
            experts.check({name: self.weights[name] for names in self.names for name in names.values()})

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        experts: ExpertSet | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        packed: bool = False,
    ) -> Decoder:
        """Load a checkpoint of transformers (safetensors, one file or sharded).

        experts: a set, or a directory that `fusedmerge.moe.save` wrote (or `load` reads). dtype: the configuration's own by default.

        Raises MissingFileError; FormatError for another architecture, an option that is not computed here, a tensor that is missing or
        unknown, a damaged file; ShapeError; DeviceError.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise InvalidTypeError(_OP, "directory", "a path", type(directory).__name__)
        where = usable_device(device, _OP)
        config, weights = read_checkpoint(directory, dtype, where)
        if experts is not None and not isinstance(experts, ExpertSet):
            experts = ExpertSet.load(experts, weights)
        return cls(config, weights, experts, packed=packed)

    @classmethod
    def from_model(cls, model: torch.nn.Module, *, packed: bool = False) -> Decoder:
        """Over the weights (and, where it was injected, the experts) of a live transformers model; nothing is copied unless packed."""
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            raise InvalidTypeError(_OP, "model", "a transformers model", type(model).__name__)
        read = DecoderConfig.of({**config.to_dict(), "architectures": None})
        found = {name: weight.tensor for name, weight in collect(model, _OP).items()}
        return cls(read, {name: found[name] for name in read.shapes() if name in found}, ExpertSet.of_model(model), packed=packed)

    def to(self, dtype: torch.dtype) -> Decoder:
        """A copy in another dtype."""
        weights = {name: weight.to(dtype, copy=True) for name, weight in self.weights.items()}
        return Decoder(self.config, weights, self.experts.to(dtype) if self.experts else None, packed=bool(self.packed))

    def _pack(self, names: Sequence[str]) -> None:
        whole = torch.cat([self.weights[name] for name in names])  # [sum of out, in]
        bias = torch.cat([self.weights[bias_name(name)] for name in names]) if bias_name(names[0]) in self.weights else None
        sizes = [len(self.weights[name]) for name in names]
        self.weights |= dict(zip(names, whole.split(sizes), strict=True))
        self.packed[names[0]] = (whole, bias)

    # ------------------------------------------------------------------ forward

    def linears(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """Plain linears that share x [..., in]: [..., out] each."""
        if len(names) > 1 and names[0] in self.packed:
            return F.linear(x, *self.packed[names[0]]).split([len(self.weights[name]) for name in names], dim=-1)
        return [F.linear(x, self.weights[name], self.weights.get(bias_name(name))) for name in names]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm of x [..., hidden] with the weight `name`."""
        return F.rms_norm(x, (self.config.hidden,), self.weights[name], self.config.norm_eps)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: Cache, positions: Tensor, span: int, apply: Apply) -> Tensor:
        """The last hidden states [B, T, hidden] of tokens [B, T] at `positions` [T] of the cache, which takes their keys and values.

        span: how many of the cache's positions may be looked at. Nothing waits for the device: a CUDA graph may hold a call.
        """
        apply.start(tokens, cache)
        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"])  # [B, T, hidden]
        turn = (positions - cache.padding[:, None]).clamp_min(0)  # [B, T]
        rope = (cache.cos[turn][:, None], cache.sin[turn][:, None])  # [B, 1, T, D] each
        masks = {window: self._mask(cache, positions, span, window) for window in set(self.config.windows)}  # [B, 1, T, span] each
        with group_once():  # layers that share a route share its grouping, where there are many tokens
            for layer, names in enumerate(self.names):
                x = self._attention(layer, x, cache, positions, rope, masks[self.config.windows[layer]], apply)  # [B, T, hidden]
                norm = f"model.layers.{layer}.post_attention_layernorm.weight"
                x = apply.feed_forward(x, norm, names["gate_proj"], names["up_proj"], names["down_proj"])  # [B, T, hidden]
        return self.norm(x, "model.norm.weight")

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> logits [..., V]."""
        return F.linear(hidden, self.head_weight)

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, *, strategy: str = "fused") -> Tensor:
        """The logits [B, T, V] of whole sequences, as transformers' forward gives them. strategy: backbone, unfused or fused (each token
        has its own experts, so nothing can be merged)."""
        if strategy not in UNMERGED:
            raise InvalidValueError("logits", "strategy", " or ".join(UNMERGED), repr(strategy))
        padding = check_tokens("logits", tokens, attention_mask, self.config.vocab, self.device)
        cache = Cache(self, *tokens.shape)
        if padding is not None:
            cache.padding.copy_(padding)
        return self.head(self.hidden(tokens, cache, cache.slots, tokens.shape[1], make(self, strategy)))

    def _attention(
        self, layer: int, x: Tensor, cache: Cache, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, apply: Apply
    ) -> Tensor:
        """x + attention(norm x), [B, T, hidden]."""
        names, width = self.names[layer], self.config.head_dim
        norm = f"model.layers.{layer}.input_layernorm.weight"
        q, k, v = apply.project_normed(x, norm, (names["q_proj"], names["k_proj"], names["v_proj"]))  # [B, T, H D], [B, T, K D] twice
        q = _rotate(q.unflatten(-1, (-1, width)).transpose(1, 2), rope)  # [B, H, T, D]
        k = _rotate(k.unflatten(-1, (-1, width)).transpose(1, 2), rope)  # [B, K, T, D]
        keys, values = cache.keys[layer], cache.values[layer]  # [B, K, S, D]
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v.unflatten(-1, (-1, width)).transpose(1, 2))  # [B, K, T, D]
        span = mask.shape[-1]
        y = F.scaled_dot_product_attention(q, keys[:, :, :span], values[:, :, :span], mask, enable_gqa=q.shape[1] != keys.shape[1])
        return apply.project_added(y.transpose(1, 2).flatten(-2), names["o_proj"], x)  # [B, T, H D] -> [B, T, hidden]

    @staticmethod
    def _mask(cache: Cache, positions: Tensor, span: int, window: int | None) -> Tensor:
        """Which positions [span] each token [T] sees. Padding sees itself, lest its softmax be empty, and nobody sees padding."""
        slots, own = cache.slots[:span], positions[:, None]  # [span], [T, 1]
        seen = slots <= own  # [T, span]
        if window is not None:
            seen = seen & (slots > own - window)
        token = slots >= cache.padding[:, None, None]  # [B, 1, span]
        return (seen & (token | (slots == own)))[:, None]  # [B, 1, T, span]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, halves apart: x [B, heads, T, D]."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)  # [B, heads, T, D / 2] each
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def check_tokens(operation: str, tokens: Any, attention_mask: Any, vocab: int, device: torch.device) -> Tensor | None:
    """Check tokens [B, T] and their mask, and return how many positions of each row are padding, int64 [B] (None: no mask).

    Raises InvalidTypeError, DtypeError, ShapeError, DeviceError; InvalidValueError for ids outside the vocabulary, and for a mask that is
    not padding at the left, or leaves a row empty. Waits for the device.
    """
    for field, tensor in (("input_ids", tokens), ("attention_mask", attention_mask)):
        if field == "attention_mask" and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTypeError(operation, field, "a tensor", type(tensor).__name__)
        if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and field == "input_ids"):
            raise DtypeError(operation, field, "integers", tensor.dtype)
        if tensor.device != device:
            raise DeviceError(operation, field, f"a tensor on the model's device ({device})", tensor.device)
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ShapeError(operation, "input_ids", "[B, T], neither of them 0", list(tokens.shape))
    low, high = (int(value) for value in tokens.aminmax())
    if low < 0 or high >= vocab:
        raise InvalidValueError(operation, "input_ids", f"0 to {vocab - 1}", low if low < 0 else high)
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape:
        raise ShapeError(operation, "attention_mask", list(tokens.shape), list(attention_mask.shape))
    mask = attention_mask.long()
    if bool((mask.diff(dim=1) < 0).any() | (mask[:, -1] != 1).any() | (mask < 0).any()):
        raise InvalidValueError(operation, "attention_mask", "rows of zeros (padding at the left), then ones", "another order")
    return tokens.shape[1] - mask.sum(dim=1)
