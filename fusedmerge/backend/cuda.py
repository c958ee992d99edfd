"""What the two ways to run the switch on an NVIDIA GPU share: the planner in the extension, streams and devices as torch has them."""

from __future__ import annotations

import ctypes
from typing import Any

from fusedmerge.backend.device import DeviceSwitch
from fusedmerge.backend.params import PlanRequest, PlanResult, SwitchSegment

__all__ = ["CudaSwitch", "extension_problem", "gpu_problem", "load_extension"]


def load_extension() -> Any:
    """The compiled extension. Raises ImportError."""
    from fusedmerge import _ext

    return _ext


def extension_problem() -> str | None:
    """Why there is no planner; None if there is."""
    try:
        load_extension()
    except ImportError as error:
        return f"the extension is not built ({error})"
    return None


def gpu_problem() -> str | None:
    """Why torch cannot use a GPU here; None if it can."""
    try:
        import torch
    except Exception as error:  # a broken install raises OSError and more
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


class CudaSwitch(DeviceSwitch):
    """One Switcher's engine on a GPU."""

    def plan(self, request: PlanRequest, table: ctypes.Array[SwitchSegment], result: PlanResult) -> bool:
        return bool(load_extension().plan_switch(ctypes.addressof(request), ctypes.addressof(table), ctypes.addressof(result)))

    def is_capturing(self) -> bool:
        import torch

        return torch.cuda.is_current_stream_capturing()
