"""save and load: experts and routers in `adapter_config.json` and `adapter_model.safetensors`, laid out as PEFT lays out an adapter.

Tensors: base_model.model.<module>.lora_A.weight [N, r, in], .lora_B.weight [N, out, r], .scaling [N], and .router.<its own names>; a router
that all layers share is base_model.model.router. The configuration stands in both files, so that two halves of different saves are noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusedmerge.checks import shorten
from fusedmerge.errors import FormatError, InvalidTypeError, InvalidValueError, MissingFileError, StateError
from fusedmerge.formats.tensors import adapter_directory, read_config, read_tensors
from fusedmerge.moe import published
from fusedmerge.moe.config import LoRAMoEConfig
from fusedmerge.moe.inject import eject, inject
from fusedmerge.moe.published import PREFIX
from fusedmerge.moe.routing import Router
from fusedmerge.moe.structure import Structure, find, injected

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]

__all__ = ["load", "save"]

PEFT_TYPE = "FUSEDMERGE_MOE"
FORMAT = "fusedmerge.moe.v1"


def save(model: nn.Module, directory: PathLike) -> None:
    """Write an injected model's experts, routers and configuration; each file appears whole or not at all.

    Raises StateError for a model that has none, or with a router that no forward has given its width; InvalidTypeError;
    InvalidValueError where `directory` is a file.
    """
    from safetensors.torch import save_file

    made = injected(model, "save")
    if not isinstance(directory, (str, os.PathLike)):
        raise InvalidTypeError("save", "directory", "a path", type(directory).__name__)
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise InvalidValueError("save", "directory", "a directory", f"a file, {str(path)!r}")
    tensors = {}
    for name, (module, attribute) in _slots(made).items():
        tensor = getattr(module, attribute)
        if isinstance(tensor, nn.UninitializedParameter):
            raise StateError("save", name, "a router whose width a forward has shown", "one that has seen no input yet")
        tensors[name] = tensor.detach().cpu().contiguous()
    config = {"peft_type": PEFT_TYPE, "format": FORMAT, **made.config.to_dict(), "places": dict(made.places)}
    path.mkdir(parents=True, exist_ok=True)
    with _replacing(path / "adapter_model.safetensors") as partial:
        save_file(tensors, partial, metadata={"config": json.dumps(config)})
    with _replacing(path / "adapter_config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def load(
    model: nn.Module, directory: PathLike, *, top_k: int | None = None, adapters: Mapping[str, PathLike] | Sequence[PathLike] | None = None
) -> nn.Module:
    """Read what `save` wrote into `model`, in place, and return it. A plain model is injected from the saved configuration first.

    Also reads the layouts of MixLoRA and MoE-PEFT, LoRAMoE (MoE-PEFT), MoLA, and X-LoRA (PEFT's, and its authors'). top_k: for MoLA,
    whose files do not say it. adapters: for X-LoRA, where its experts lie now ({name: directory}, or directories in their order).

    Raises MissingFileError; FormatError for a file that is damaged, incomplete or of another model; InvalidValueError where the model
    was injected with another configuration; and as `inject` does. A call that raises has changed nothing.
    """
    path, _ = adapter_directory(directory, "load")
    if published.is_published(path):
        config, tensors, places = published.read(model, path, top_k, adapters)
    else:
        config, tensors, places = _read(path)
    fresh = find(model) is None
    if fresh:
        inject(model, config)
    try:
        made = injected(model, "load")
        if made.config != config:
            own, saved = made.config.to_dict(), config.to_dict()
            other = [f"{name}: {own[name]!r} and {saved[name]!r}" for name in own if own[name] != saved[name]]
            raise InvalidValueError("load", "model", "the saved configuration", shorten(other))
        _fill(made, tensors)
        made.places.update(places)
    except BaseException:
        if fresh:
            eject(model)
        raise
    return model


def _read(path: Path) -> tuple[LoRAMoEConfig, dict[str, torch.Tensor], dict[str, str]]:
    values = read_config(path, "load")
    if values.pop("peft_type", None) != PEFT_TYPE or values.pop("format", None) != FORMAT:
        raise FormatError("load", str(path), f"a model that fusedmerge.moe.save wrote ({FORMAT}), or a known project's", "another adapter")
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise MissingFileError("load", "directory", f"a file {file.name}", f"none in {str(path)!r}")
    tensors = read_tensors(path, "load")
    inside = json.loads(_metadata(file).get("config", "null"))
    if inside != {"peft_type": PEFT_TYPE, "format": FORMAT, **values}:
        raise FormatError("load", str(path), "two files of one save", "a configuration that is not the one in the tensors' file")
    places = values.pop("places", {})
    return LoRAMoEConfig.from_dict(values, "load"), tensors, places


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _slots(made: Structure) -> dict[str, tuple[nn.Module, str]]:
    """Every tensor's name in the file -> (module, attribute) that holds it."""
    slots: dict[str, tuple[nn.Module, str]] = {}
    for name, part in made.parts.items():
        slots[f"{PREFIX}{name}.lora_A.weight"] = (part, "lora_A")
        slots[f"{PREFIX}{name}.lora_B.weight"] = (part, "lora_B")
        slots[f"{PREFIX}{name}.scaling"] = (part, "scaling")
    for name, router in made.routers.items():
        at = PREFIX + ("router" if name == "router" else f"{name}.router")
        for inner, module in router.named_modules():
            held = [*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)]
            for attribute in held:
                if getattr(module, attribute) is not None:
                    slots[".".join(filter(None, (at, inner, attribute)))] = (module, attribute)
    return slots


def _fill(made: Structure, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set every tensor of the model from the file's, after all of them were checked."""
    slots = _slots(made)
    if missing := slots.keys() - tensors.keys():
        raise FormatError("load", "tensors", "every tensor of the configuration", f"no {shorten(missing)}")
    if unknown := tensors.keys() - slots.keys():
        raise FormatError("load", "tensors", "tensors of the configuration only", shorten(unknown))
    for name, (module, attribute) in slots.items():
        given, own = tensors[name], getattr(module, attribute)
        if isinstance(own, nn.UninitializedParameter):
            fits = given.dim() == 2 and isinstance(module, Router) and given.shape[0] == module.num_experts
        else:
            fits = given.shape == own.shape and given.is_floating_point() == own.is_floating_point()
        if not fits:
            expected = "a router's [N, in]" if isinstance(own, nn.UninitializedParameter) else list(own.shape)
            raise FormatError("load", name, f"shape {expected}", f"{list(given.shape)} ({given.dtype})")
        if given.is_floating_point() and not bool(torch.isfinite(given).all()):
            raise FormatError("load", name, "finite values", "inf or NaN")
    for name, (module, attribute) in slots.items():
        own = getattr(module, attribute)
        if isinstance(own, nn.UninitializedParameter):
            own.materialize(tensors[name].shape)
        dtype = (
            torch.float32 if attribute == "scaling" else tensors[name].dtype
        )  # else the file's, so that saving again gives the same bits
        own.data = tensors[name].to(own.device, dtype)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """What is written to the path it yields takes the file's place at the end, or nothing does."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
