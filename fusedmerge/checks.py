"""Small checks that several modules share."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.errors import DeviceError, FormatError, MissingFileError

if TYPE_CHECKING:
    import torch

__all__ = ["as_tensor", "read_json", "shorten", "to_float32", "usable_device"]

_SHOWN = 5


def as_tensor(array: Any) -> Any:
    """A torch tensor over the memory of a CuPy, NumPy or other array (DLPack, __cuda_array_interface__); anything else as it is."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    return torch.as_tensor(array) if hasattr(array, "__cuda_array_interface__") else array


def read_json(path: Path, operation: str) -> dict[str, Any]:
    """A file's JSON object. Raises MissingFileError, or FormatError for anything else."""
    if not path.is_file():
        raise MissingFileError(operation, str(path.parent), f"a file {path.name}", "none")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(operation, str(path), "valid JSON", error) from error
    if not isinstance(content, dict):
        raise FormatError(operation, str(path), "a JSON object", f"a JSON {type(content).__name__}")
    return content


def shorten(names: Collection[str]) -> str:
    """The first five of `names`, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def to_float32(value: float) -> float:
    """The nearest float32, as a float; inf where there is none."""
    try:
        return ctypes.c_float(value).value  # a tenth of what numpy takes, and a switch asks ten times
    except OverflowError:  # an int beyond float64
        return float("inf")


def usable_device(device: torch.device | str, operation: str) -> torch.device:
    """`device`, if torch can compute there. Raises DeviceError."""
    import torch

    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(operation, "device", "a device that torch can use here", f"{device!r} ({str(error).splitlines()[0]})") from error
    if where.type == "meta":
        raise DeviceError(operation, "device", "a device that computes", "meta")
    return where
