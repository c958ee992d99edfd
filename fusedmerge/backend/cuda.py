"""What the two ways to run the switch on an NVIDIA GPU share: the planner in the extension, streams and devices as torch has them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusedmerge.backend.device import DeviceSwitch
from fusedmerge.backend.params import PlanRequest, PlanResult, SwitchSegment

__all__ = ["CudaSwitch", "extension_problem", "gpu_problem", "launch_by_cupy", "load_extension"]


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


def launch_by_cupy(function: Any, params: ctypes.Structure, size: tuple[int, int, int], stream: int) -> None:
    """Launch a cupy.RawKernel with (grid, threads, shared bytes) on a stream. Raises what CuPy raises."""
    grid, threads, shared_bytes = size
    argument = np.frombuffer(bytes(params), dtype=np.dtype((np.void, ctypes.sizeof(params))))  # CuPy passes its bytes by value
    # CuPy reads the stream's `ptr` alone; its ExternalStream warns at each use, and goes.
    function((grid,), (threads,), (argument,), shared_mem=shared_bytes, stream=SimpleNamespace(ptr=stream))


class CudaSwitch(DeviceSwitch):
    """One Switcher's engine on a GPU."""

    def plan(self, request: PlanRequest, table: ctypes.Array[SwitchSegment], result: PlanResult) -> bool:
        return bool(load_extension().plan_switch(ctypes.addressof(request), ctypes.addressof(table), ctypes.addressof(result)))

    def is_capturing(self) -> bool:
        import torch

        return torch.cuda.is_current_stream_capturing()
