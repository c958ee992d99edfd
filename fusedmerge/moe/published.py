"""LoRA-MoE checkpoints of other projects, as the tensors and the configuration that `save` would have written.

MixLoRA and MoE-PEFT, MoLA: fusedmerge.formats.read_moe knows their files. X-LoRA: PEFT's `adapter_config.json` (peft_type XLORA) with
the classifier in `adapter_model.safetensors`, or its authors' `xlora_config.json` with `xlora_classifier.safetensors` (EricLBuehler/xlora).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmerge.checks import read_json, shorten
from fusedmerge.errors import FormatError, InvalidValueError, MissingFileError, UnknownNameError
from fusedmerge.formats.moe import MoECheckpoint, layout_of, read_moe
from fusedmerge.formats.peft import read_peft
from fusedmerge.formats.tensors import read_config, read_tensors
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.targets import Plan, layer_of, make_plan

if TYPE_CHECKING:
    from fusedmerge.formats.lora import Adapter

    PathLike = str | os.PathLike[str]

__all__ = ["PREFIX", "is_published", "read", "stacked"]

Read = tuple[LoRAMoEConfig, dict[str, torch.Tensor], dict[str, str]]  # configuration, tensors by the names `save` gives them, places
PREFIX = "base_model.model."  # of every tensor in a file, as PEFT has it


def is_published(path: Path) -> bool:
    """Whether a directory is another project's mixture. Raises MissingFileError, FormatError."""
    if (path / "xlora_config.json").is_file():
        return True
    config = read_config(path, "load")
    if config.get("peft_type") == "FUSEDMERGE_MOE":
        return False
    return config.get("peft_type") == "XLORA" or layout_of(config, read_tensors(path, "load")) is not None


def read(model: nn.Module, path: Path, top_k: int | None, adapters: Mapping[str, PathLike] | Sequence[PathLike] | None) -> Read:
    """Raises MissingFileError, FormatError, InvalidValueError."""
    if (path / "xlora_config.json").is_file():
        return _xlora(model, path, read_json(path / "xlora_config.json", "load"), adapters)
    config = read_config(path, "load")
    if config.get("peft_type") == "XLORA":
        return _xlora(model, path, config, adapters)
    return _experts_by_layer(model, read_moe(path), top_k)


def stacked(adapters: Sequence[Adapter], plan: Plan, r: int) -> dict[str, torch.Tensor]:
    """Adapters as each linear's stacked experts, padded with zeros to rank r; 0 where an adapter has no factors for a linear.

    Factors keep their dtype where all of a linear's have one, else they become float32. Raises UnknownNameError for factors that no linear
    of the plan takes, and ShapeError.
    """
    tensors: dict[str, torch.Tensor] = {}
    if absent := {target for adapter in adapters for target in adapter.targets} - {site.name for site in plan.sites}:
        raise UnknownNameError("load", "adapters", "targets that the model has, where the method puts experts", shorten(absent))
    for site in plan.sites:
        module = site.name.removesuffix(".weight")
        rows, columns = site.linear.out_features, site.linear.in_features
        members = [adapter.targets.get(site.name) for adapter in adapters[: site.num_experts]]
        found = {factors.a.dtype for factors in members if factors is not None}
        dtype = found.pop() if len(found) == 1 else torch.float32
        a = torch.zeros(site.num_experts, r, columns, dtype=dtype)
        b = torch.zeros(site.num_experts, rows, r, dtype=dtype)
        scaling = torch.zeros(site.num_experts)
        for index, given in enumerate(members):
            if given is not None:
                factors = given.oriented((rows, columns), False, "load", f"{adapters[index].name} on {site.name}")
                a[index, : factors.rank], b[index, :, : factors.rank] = factors.a, factors.b
                scaling[index] = factors.scaling
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b, f"{PREFIX}{module}.scaling": scaling}
    return tensors


def _experts_by_layer(model: nn.Module, checkpoint: MoECheckpoint, top_k: int | None) -> Read:
    """MixLoRA, LoRAMoE and MoLA."""
    top_k = checkpoint.top_k if top_k is None else top_k
    if top_k is None and checkpoint.method == "mola":
        raise InvalidValueError("load", "top_k", "a number (MoLA's files do not hold it)", "None")
    activation = getattr(getattr(model, "config", None), "hidden_act", None)
    if checkpoint.method == "mixlora" and checkpoint.config.get("act_fn") not in (None, activation):
        raise FormatError("load", "act_fn", f"the model's own activation ({activation})", checkpoint.config["act_fn"])
    beside = [checkpoint.static] if checkpoint.static else []
    factors = [factors for adapter in (*checkpoint.experts, *beside) for factors in adapter.targets.values()]
    counts: dict[str, int] = {}
    for module, router in checkpoint.routers.items():
        number = int(router.shape[0])
        if counts.setdefault(layer_of(module), number) != number:
            raise FormatError("load", module, "as many experts everywhere in a layer", f"{number} and {counts[layer_of(module)]}")
    ordered = [counts[layer] for layer in sorted(counts, key=lambda layer: [int(number) for number in re.findall(r"\d+", layer)])]
    config = LoRAMoEConfig(
        method=checkpoint.method,
        num_experts=ordered[0] if len(set(ordered)) == 1 else tuple(ordered),
        top_k=top_k,
        r=max(pair.rank for pair in factors),
        lora_dropout=checkpoint.config.get("lora_dropout") or 0.0,
        target_modules=_modules([*checkpoint.experts, *beside]),
    )
    plan = make_plan(model, config, "load")
    tensors: dict[str, torch.Tensor] = {}
    for members, static in ((checkpoint.experts, False), (beside, True)):
        tensors |= stacked(members, Plan(tuple(site for site in plan.sites if site.static is static), ()), int(config.r or 0))
    tensors |= {f"{PREFIX}{name}.router.weight": router for name, router in checkpoint.routers.items()}
    return config, tensors, {}


def _modules(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(sorted({target.removesuffix(".weight") for adapter in adapters for target in adapter.targets}))


def _xlora(model: nn.Module, path: Path, values: dict[str, Any], adapters: Mapping[str, PathLike] | Sequence[PathLike] | None) -> Read:
    named = _xlora_adapters(path, values, adapters)
    loaded = [read_peft(directory, name) for name, directory in named.items()]
    factors = [pair for adapter in loaded for pair in adapter.targets.values()]
    if values.get("scaling_pass_value", 0.0) not in (0, 0.0):
        raise FormatError("load", "scaling_pass_value", "0 (a first pass of the bare model)", values["scaling_pass_value"])
    softmax, of_topk, top_k = values.get("enable_softmax", True), values.get("enable_softmax_topk", False), values.get("top_k_lora")
    if softmax and of_topk:
        raise FormatError("load", "enable_softmax_topk", "a softmax over all or over the top k, not one of the other", "both")
    config = LoRAMoEConfig(
        method="xlora",
        num_experts=len(loaded),
        top_k=top_k,
        r=max(pair.rank for pair in factors),
        target_modules=_modules(loaded),
        gating="softmax_of_topk" if of_topk else "topk_of_softmax",
        train_experts=bool(values.get("use_trainable_adapters", False)),
        expert_names=tuple(named),
        xlora={
            "depth": values.get("xlora_depth", 1),
            "size": values.get("xlora_size", 2048),
            "dropout": values.get("xlora_dropout_p", 0.2) if values.get("enable_relu_and_dropout", True) else 0.0,
            "relu": values.get("enable_relu_and_dropout", True),
            "layerwise": values.get("layerwise_scalings", False),
            "softmax": bool(softmax or of_topk),
            "temperature": values.get("softmax_temperature", 1.0) if softmax else 1.0,
            "global_scaling": values.get("global_scaling_weight", 1.0),
            "bias": values.get("use_bias", True),
        },
    )
    tensors = stacked(loaded, make_plan(model, config, "load"), int(config.r or 0))
    for index, pair in enumerate(_classifier(path)):
        for attribute, tensor in pair.items():
            tensors[f"{PREFIX}router.layers.{index}.{attribute}"] = tensor
    return config, tensors, {}


def _xlora_adapters(path: Path, values: Mapping[str, Any], adapters: Mapping[str, PathLike] | Sequence[PathLike] | None) -> dict[str, Path]:
    """Each expert's name and directory, in order: as the caller says, or as the file does (relative to its own directory)."""
    names = list(values.get("adapters") or {})
    if adapters is None:
        stored = {name: path / "adapters" / name for name in names}
        stored = {name: at if at.is_dir() else path / str(values["adapters"][name]) for name, at in stored.items()}
    elif isinstance(adapters, Mapping):
        if names and set(names) != set(adapters):
            raise InvalidValueError("load", "adapters", f"those of the file: {', '.join(names)}", ", ".join(adapters))
        stored = {name: Path(adapters[name]) for name in names or adapters}
    else:
        if names and len(names) != len(adapters):
            raise InvalidValueError("load", "adapters", f"{len(names)} directories", len(adapters))
        labels = names or [Path(at).name for at in adapters]
        stored = {name: Path(at) for name, at in zip(labels, adapters, strict=True)}
    if not stored:
        raise FormatError("load", "adapters", "the experts' directories (see load's adapters=)", "none")
    for name, at in stored.items():
        if not at.is_dir():
            raise MissingFileError("load", f"adapters: {name}", "its directory (see load's adapters=)", f"{str(at)!r}, which is not one")
    return stored


def _classifier(path: Path) -> list[dict[str, torch.Tensor]]:
    """The classifier's linears in order, each with its weight and bias."""
    from safetensors.torch import load_file

    file = path / "xlora_classifier.safetensors"
    tensors = load_file(file) if file.is_file() else read_tensors(path, "load")
    linears: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.search(r"(?:^|\.)(?:(?:layers|inner)\.(?P<index>\d+)|last)\.(?P<attribute>weight|bias)$", name)
        if match is None:
            raise FormatError("load", "tensors", "an X-LoRA classifier's layers", name)
        place = (0, int(match["index"])) if match["index"] else (1, 0)
        linears.setdefault(place, {})[match["attribute"]] = tensor
    return [pair for _, pair in sorted(linears.items())]
