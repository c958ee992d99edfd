"""Small checks that several modules share."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fusedmerge.errors import DeviceError

if TYPE_CHECKING:
    import torch

__all__ = ["shorten", "to_float32", "usable_device"]

_SHOWN = 5


def shorten(names: Collection[str]) -> str:
    """The first five of `names`, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def to_float32(value: float) -> float:
    """The nearest float32, as a float; inf where there is none."""
    import numpy as np

    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
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
