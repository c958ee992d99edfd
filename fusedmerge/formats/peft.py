"""PEFT adapter directories, as PEFT's `save_pretrained` writes them.

Every tensor of the file is used or refused by name, and every configuration field is honoured, known to be harmless, or refused
(fusedmerge.formats.peft_config): an adapter that is read merges as PEFT would merge it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import shorten
from fusedmerge.errors import FormatError
from fusedmerge.formats.lora import Adapter
from fusedmerge.formats.moe import layout_of
from fusedmerge.formats.peft_config import LoraRule, check_fields, flag
from fusedmerge.formats.tensors import adapter_directory, make_factors, read_config, read_tensors
from fusedmerge.weights import canonical_name

if TYPE_CHECKING:
    import torch

    from fusedmerge.formats.tensors import PathLike

__all__ = ["read_peft"]

_OPERATION = "read_peft"

# <module>.lora_A.weight and <module>.lora_embedding_A; some writers leave the adapter's name in: <module>.lora_A.<adapter>.weight.
_LINEAR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")


def read_peft(directory: PathLike, name: str | None = None) -> Adapter:
    """The LoRA adapter in a directory: `adapter_config.json` with `adapter_model.safetensors` or `adapter_model.bin`.

    Factors are A [r, in] and B [out, r] of a linear layer, A [r, vocab] and B [dim, r] of an embedding (then `transposed`), on the
    CPU, in the file's dtype (float16, bfloat16, float32 or float64). `name` defaults to the last part of the path.

    Raises `MissingFileError` where a file is not there, and `FormatError`, naming the file, the field or the tensor, where one is
    damaged or asks for anything that scaling * B A cannot express.
    """
    path, last_part = adapter_directory(directory, _OPERATION)
    config = read_config(path, _OPERATION)
    _check_method(config, ())
    check_fields(config, _OPERATION)
    tensors = read_tensors(path, _OPERATION)
    _check_method(config, tensors)
    rule = LoraRule.of(config, _OPERATION)
    transposed = flag(config, "fan_in_fan_out", _OPERATION)
    linear, embedding, base = _sort(tensors)
    targets = {}
    for layers, stored_in_out in ((linear, transposed), (embedding, True)):
        for target, sides in layers.items():
            scale = rule.scale(target.removesuffix(".weight"))
            targets[target] = make_factors(target, sides, scale, stored_in_out, _OPERATION)
    if not targets:
        raise FormatError(_OPERATION, "tensors", "the factors of at least one module", "none")
    return Adapter(last_part if name is None else name, targets, config, base)


def _check_method(config: Mapping[str, Any], keys: Collection[str]) -> None:
    layout = layout_of(config, keys)
    if layout is not None:
        raise FormatError(_OPERATION, "directory", "a plain LoRA adapter", f"a mixture of LoRA experts ({layout.title}): use read_moe")
    if config.get("peft_type") != "LORA":
        raise FormatError(_OPERATION, "peft_type", "LORA", repr(config.get("peft_type")))


_Layers = dict[str, dict[str, tuple[str, "torch.Tensor"]]]  # canonical weight name -> side -> (name in the file, tensor)


def _sort(tensors: Mapping[str, torch.Tensor]) -> tuple[_Layers, _Layers, dict[str, torch.Tensor]]:
    """The factors of linear layers, those of embeddings, and the base weights that the file carries."""
    linear: _Layers = {}
    embedding: _Layers = {}
    base: dict[str, torch.Tensor] = {}
    adapters: set[str] = set()
    unknown = []
    for key, tensor in tensors.items():
        if match := _LINEAR.fullmatch(key) or _EMBEDDING.fullmatch(key):
            layers = linear if match.re is _LINEAR else embedding
            sides = layers.setdefault(canonical_name(match["module"] + ".weight"), {})
            _check_new(key, sides.get(match["side"], ("",))[0])
            sides[match["side"]] = (key, tensor)
            adapters.add(match["adapter"] or "")
        elif key.endswith(".weight") and "lora_" not in key:
            _check_new(key, "a base weight" if canonical_name(key) in base else "")
            base[canonical_name(key)] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise FormatError(_OPERATION, "tensors", "lora_A, lora_B, lora_embedding_A, lora_embedding_B or base weights", shorten(unknown))
    if len(adapters) > 1:
        raise FormatError(_OPERATION, "tensors", "one adapter", f"adapters named {shorten([repr(name) for name in adapters])}")
    if twice := linear.keys() & embedding.keys():
        raise FormatError(_OPERATION, "tensors", "a linear layer or an embedding", f"factors of both for {shorten(twice)}")
    return linear, embedding, base


def _check_new(key: str, other: str) -> None:
    if other:
        raise FormatError(_OPERATION, "tensors", "one tensor of each name (wrappers' prefixes dropped)", f"{key} and {other}")
