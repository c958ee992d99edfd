"""Which modules a configuration adapts, and whether they can be: a plan that is made, and refused, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusedmerge.checks import shorten
from fusedmerge.errors import DeviceError, DtypeError, InvalidTypeError, InvalidValueError, StateError
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.weights import canonical_name, collect

__all__ = ["Block", "Plan", "Site", "layer_of", "make_plan", "token_embedding"]

_FIRST_NUMBER = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"(?:^|\.)(?:mlp|ffn|feed_forward)$", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A linear to adapt."""

    path: str  # in the module tree, now
    name: str  # canonical weight name
    linear: nn.Linear
    layer: str  # the path of the layer around it; "": none
    block: str  # the path of the MLP around it, for the methods that route there; "" elsewhere
    num_experts: int
    static: bool  # one plain LoRA, always on


@dataclass(frozen=True)
class Block:
    """An MLP to adapt as a whole."""

    path: str
    module: nn.Module
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    num_experts: int


@dataclass(frozen=True)
class Plan:
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]


def layer_of(path: str) -> str:
    """`model.layers.3` for `model.layers.3.self_attn.q_proj`: up to the first number; "" where there is none.

    >>> layer_of("model.layers.3.self_attn.q_proj")
    'model.layers.3'
    """
    match = _FIRST_NUMBER.match(path)
    return match[0] if match else ""


def token_embedding(model: Any) -> nn.Embedding | None:
    """A transformers model's embedding of token ids; None where there is none."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def make_plan(model: nn.Module, config: LoRAMoEConfig, operation: str) -> Plan:
    """Raises InvalidTypeError, InvalidValueError, StateError, DtypeError, DeviceError."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(operation, "model", "an nn.Module", type(model).__name__)
    if not isinstance(config, LoRAMoEConfig):
        raise InvalidTypeError(operation, "config", "a LoRAMoEConfig", type(config).__name__)
    if config.method == "pesc":
        return Plan((), tuple(_pesc_blocks(model, config, operation)))
    linears = dict(_matching(model, config, operation))
    for path, linear in linears.items():
        _check_linear(model, path, linear, operation)
    counts = _counts(config, [layer_of(path) for path in linears], operation)
    sites, blocks = [], {}
    for path, linear in linears.items():
        block = _block_of(model, path) if config.method == "mixlora" else ""
        static = config.method == "lora" or (config.traits.experts_in == "mlp" and (_ATTENTION.search(path) is not None))
        if config.method == "mixlora" and not block:
            static = True
        number = 1 if static else counts[layer_of(path)]
        sites.append(Site(path, canonical_name(f"{path}.weight"), linear, layer_of(path), block, number, static))
        if block:
            where = linear.weight
            gate = model.get_submodule(f"{block}.gate_proj")
            assert isinstance(gate, nn.Linear)
            blocks[block] = Block(
                block, model.get_submodule(block), gate.in_features, gate.in_features, where.dtype, where.device, counts[layer_of(path)]
            )
    if config.traits.experts_in == "mlp" and all(site.static for site in sites):
        raise InvalidValueError(
            operation, "target_modules", f"linears of an MLP ({config.method} puts its experts there)", shorten(linears)
        )
    return Plan(tuple(sites), tuple(blocks.values()))


def _matching(model: nn.Module, config: LoRAMoEConfig, operation: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that target_modules means, by path; of a module that is registered twice, the first path."""
    targets = config.target_modules
    any_model: Any = model
    output = any_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found, others = {}, []
    for path, module in model.named_modules():
        if targets == "all-linear":
            matches = isinstance(module, nn.Linear) and module is not output and not _read_by_parent(module)
        elif isinstance(targets, str):
            matches = re.fullmatch(targets, path) is not None
        else:
            matches = any(path == target or path.endswith(f".{target}") for target in targets)
        if matches and isinstance(module, nn.Linear):
            found[path] = module
        elif matches:
            others.append(f"{path} ({type(module).__name__})")
    if others:
        raise InvalidTypeError(operation, "target_modules", "names of nn.Linear modules", shorten(others))
    if "" in found:
        raise InvalidTypeError(operation, "model", "a module with linears inside it", "a Linear")
    if not found:
        names = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)})
        shown = targets if isinstance(targets, str) else list(targets)
        raise InvalidValueError(operation, "target_modules", f"names that match a linear ({shorten(names) or 'the model has none'})", shown)
    yield from found.items()


def _read_by_parent(linear: nn.Module) -> bool:
    """nn.MultiheadAttention computes with its out_proj's weight, and never calls it."""
    return isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _check_linear(model: nn.Module, path: str, linear: nn.Linear, operation: str) -> None:
    parts = path.split(".")
    for depth in range(len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        if hasattr(around, "lora_A") or hasattr(around, "base_layer"):
            kind = type(around).__name__
            raise StateError(operation, path, "a linear that no adapter wraps (eject, or merge and unload, it first)", f"one in a {kind}")
    weight = collect(linear, operation).get("weight")
    if weight is None or type(linear).forward is not nn.Linear.forward or _read_by_parent(linear):
        raise InvalidTypeError(operation, path, "a Linear that computes x W^T + b with a weight of its own", type(linear).__name__)
    if weight.quantised or not weight.tensor.is_floating_point():
        raise DtypeError(operation, path, "a plain floating-point weight", f"a quantised one ({weight.quantised or weight.tensor.dtype})")
    if weight.tensor.device.type == "meta":
        raise DeviceError(operation, path, "a weight with storage (load or materialise the model first)", "device meta")


def _counts(config: LoRAMoEConfig, layers: list[str], operation: str) -> dict[str, int]:
    """N by layer. A list is spread over the layers by depth."""
    distinct = list(dict.fromkeys(layers))
    if not isinstance(config.num_experts, tuple):
        return dict.fromkeys(distinct, config.max_experts)
    groups = len(config.num_experts)
    if len(distinct) % groups:
        raise InvalidValueError(
            operation, "num_experts", f"a number, or a list whose length divides {len(distinct)} layers", f"{groups} entries"
        )
    return {layer: config.num_experts[index * groups // len(distinct)] for index, layer in enumerate(distinct)}


def _block_of(model: nn.Module, path: str) -> str:
    """The gated MLP (gate_proj, up_proj, down_proj, act_fn) that a linear is a direct part of; "": none."""
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(parent)
    whole = all(isinstance(getattr(module, name, None), nn.Linear) for name in _GATED_MLP) and callable(getattr(module, "act_fn", None))
    return parent if whole and leaf in _GATED_MLP else ""


def _pesc_blocks(model: nn.Module, config: LoRAMoEConfig, operation: str) -> Iterator[Block]:
    """MLPs whose path, or a linear in which, target_modules matches."""
    chosen: dict[str, list[nn.Linear]] = {}
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = config.target_modules
    for path, module in model.named_modules():
        inside = {p: m for p, m in linears.items() if p.startswith(f"{path}.")}
        if not _MLP.search(path) or not inside:
            continue
        names = [path, *inside]
        if isinstance(targets, str):
            hit = targets == "all-linear" or any(re.fullmatch(targets, name) for name in names)
        else:
            hit = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
        if hit:
            chosen[path] = list(inside.values())
            for name, linear in inside.items():
                _check_linear(model, name, linear, operation)
            if hasattr(module, "lora_A"):
                raise StateError(operation, path, "an MLP that no adapter wraps", f"a {type(module).__name__}")
    if not chosen:
        shown = targets if isinstance(targets, str) else list(targets)
        raise InvalidValueError(operation, "target_modules", "names that match an MLP (a module called mlp, ffn or feed_forward)", shown)
    counts = _counts(config, [layer_of(path) for path in chosen], operation)
    for path, parts in chosen.items():
        first, last = parts[0], parts[-1]
        yield Block(
            path,
            model.get_submodule(path),
            first.in_features,
            last.out_features,
            last.weight.dtype,
            last.weight.device,
            counts[layer_of(path)],
        )
