"""An adapter's files: the JSON configuration and the tensors, checked before anything is computed from them.

Nothing here runs code out of a file: safetensors holds plain data, and a `.bin` is read by torch's weights-only unpickler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.checks import read_json
from fusedmerge.errors import FormatError, InvalidTypeError, MissingFileError
from fusedmerge.formats.lora import Factors

if TYPE_CHECKING:
    import torch

    PathLike = str | os.PathLike[str]
    Sides = Mapping[str, tuple[str, torch.Tensor]]  # "A" and "B" -> the tensor's name in its file, the tensor

__all__ = ["adapter_directory", "check_matrix", "make_factors", "read_config", "read_tensors"]

_CONFIG = "adapter_config.json"
_SAFETENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def adapter_directory(directory: PathLike, operation: str) -> tuple[Path, str]:
    """The directory, and its last path part. Raises `MissingFileError` where it is not there."""
    if not isinstance(directory, str | os.PathLike):
        raise InvalidTypeError(operation, "directory", "a path", type(directory).__name__)
    path = Path(directory)
    if not path.is_dir():
        raise MissingFileError(operation, "directory", "an adapter's directory", f"{str(path)!r}, which is not one")
    return path, os.path.basename(os.path.abspath(path))


def read_config(directory: Path, operation: str) -> dict[str, Any]:
    """`adapter_config.json`. Raises `MissingFileError`, or `FormatError` where it is not one JSON object."""
    return read_json(directory / _CONFIG, operation)


def read_tensors(directory: Path, operation: str) -> dict[str, torch.Tensor]:
    """All tensors of the adapter on the CPU, by their names in the file; safetensors is preferred to a pickle.

    Raises `MissingFileError`, or `FormatError` where the file is damaged, holds no tensors, or holds anything but tensors.
    """
    loaders = {_SAFETENSORS: _load_safetensors, _PICKLE: _load_pickle}
    name = next((name for name in loaders if (directory / name).is_file()), None)
    if name is None:
        raise MissingFileError(operation, "directory", f"a file {_SAFETENSORS} or {_PICKLE}", f"neither in {str(directory)!r}")
    path = directory / name
    try:
        loaded = loaders[name](path)
    except Exception as error:  # a damaged file makes the loaders raise nearly anything
        raise FormatError(operation, str(path), "a whole file of tensors", f"{type(error).__name__}: {error}") from error
    return _check_tensors(loaded, path, operation)


def _load_safetensors(path: Path) -> object:
    from safetensors.torch import load_file

    return load_file(path)


def _load_pickle(path: Path) -> object:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _check_tensors(loaded: object, path: Path, operation: str) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(loaded, Mapping):
        raise FormatError(operation, str(path), "a mapping of names to tensors", type(loaded).__name__)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FormatError(operation, str(path), "a mapping of names to tensors", f"{type(value).__name__} under {name!r}")
    if not loaded:
        raise FormatError(operation, str(path), "at least one tensor", "none")
    for name, tensor in loaded.items():
        _check_dense(tensor, name, operation)
    return {name: value.detach() for name, value in loaded.items()}


def _check_dense(tensor: torch.Tensor, name: str, operation: str) -> None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise FormatError(operation, name, "a dense tensor with storage", f"layout {tensor.layout} on {tensor.device}")


def check_matrix(tensor: torch.Tensor, name: str, operation: str) -> torch.Tensor:
    """`tensor`, detached, if it is a finite, dense, floating-point matrix; a `FormatError` naming it otherwise."""
    import torch

    _check_dense(tensor, name, operation)
    if tensor.dim() > 2:
        raise FormatError(operation, name, "a matrix (LoRA on a convolution is not supported)", f"shape {list(tensor.shape)}")
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise FormatError(operation, name, "a matrix (were the shards gathered before saving?)", f"shape {list(tensor.shape)}")
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise FormatError(operation, name, "bfloat16, float16, float32 or float64", tensor.dtype)
    if not torch.isfinite(tensor).all():
        raise FormatError(operation, name, "finite values", f"{int((~torch.isfinite(tensor)).sum())} that are inf or nan")
    return tensor.detach()


def make_factors(target: str, sides: Sides, scale: tuple[int | None, float], transposed: bool, operation: str) -> Factors:
    """The factors of one target from its two tensors, A [r, in] and B [out, r].

    `scale` is the rank that the configuration states (None: any) and the scaling. Raises `FormatError`.
    """
    for side, other in ("AB", "BA"):
        if side not in sides:
            raise FormatError(operation, target, "a lora_A and a lora_B", f"{sides[other][0]} without its lora_{side}")
    a, b = (check_matrix(tensor, name, operation) for name, tensor in (sides["A"], sides["B"]))
    stated, scaling = scale
    rank = a.shape[0] if stated is None else stated
    for (name, tensor), got in ((sides["A"], a.shape[0]), (sides["B"], b.shape[1])):
        if got != rank:
            raise FormatError(operation, name, f"rank {rank}", f"rank {got} (shape {list(tensor.shape)})")
    return Factors(a, b, scaling, transposed)
