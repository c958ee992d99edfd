"""The switch on the CPU by the CUDA kernel's own sources, on the host simulator that `make sim` builds (tests/sim).

For tests and for looking into the kernel, not for speed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from fusedmerge.backend.cpu import Segment
from fusedmerge.backend.device import DeviceSwitch, Group
from fusedmerge.backend.params import PlanRequest, PlanResult, SimOptions, SwitchParams, SwitchSegment, layout
from fusedmerge.errors import BackendError

__all__ = ["MULTIPROCESSORS", "SHARED_BYTES", "SimSwitch", "library", "library_path"]

MULTIPROCESSORS = 4
SHARED_BYTES = 99 << 10  # of a block, on the smallest device that the kernels are made for


def library_path() -> Path:
    """FUSEDMERGE_SIM_LIB, or where `make sim` builds it in the checkout that this package is part of."""
    given = os.environ.get("FUSEDMERGE_SIM_LIB")
    return Path(given).absolute() if given else Path(__file__).resolve().parents[2] / "build/sim/libfusedmerge_sim.so"


def library() -> ctypes.CDLL:
    """The simulator. Raises BackendError with the reason where there is none that fits this package."""
    path = library_path()
    try:
        return _load(path, path.stat().st_mtime_ns)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be loaded ({error})"
        raise _unusable(f"{path} {reason}: run `make sim` in a checkout of fusedmerge; FUSEDMERGE_SIM_LIB names another place") from error


@functools.cache
def _load(path: Path, _built: int) -> ctypes.CDLL:
    """One library per build, checked against this package."""
    from fusedmerge import __version__

    lib = ctypes.CDLL(str(path))
    try:
        stated = lib.fm_sim_version, lib.fm_sim_layout
        for function in (*stated, lib.fm_sim_error):
            function.restype = ctypes.c_char_p
        lib.fm_sim_plan.argtypes = [ctypes.c_void_p] * 3
        lib.fm_sim_switch.argtypes = [*[ctypes.c_int] * 3, ctypes.c_void_p, *[ctypes.c_int] * 2, ctypes.c_void_p]
        lib.fm_sim_kernel.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p]
    except AttributeError as error:
        raise _unusable(f"{path} is no simulator of this version ({error}): run `make sim`") from error
    version, described = (function().decode() for function in stated)
    difference = _difference(f"fusedmerge {version}\n{described}", f"fusedmerge {__version__}\n{layout()}")
    if difference:
        raise _unusable(f"{path} was built from other sources ({difference}): run `make sim`")
    return lib


def _difference(theirs: str, ours: str) -> str:
    """The first line in which two interfaces differ; "" if none."""
    pairs = zip([*theirs.splitlines(), "end"], [*ours.splitlines(), "end"], strict=False)
    return next((f'it says "{x}", this package "{y}"' for x, y in pairs if x != y), "")


def _unusable(reason: str) -> BackendError:
    return BackendError("switch", 'backend "sim"', "a usable simulator", reason)


class SimSwitch(DeviceSwitch):
    """One Switcher's engine on the simulator, with CPU tensors. A kernel that breaks the simulator's rules raises BackendError."""

    def __init__(self, segments: Sequence[Segment], report_non_finite: bool = False) -> None:
        self._library = library()
        self._options = SimOptions(thread_order=0, tensor_core=1, async_copies=0, resident_blocks=2, seed=1)
        super().__init__(segments, report_non_finite, MULTIPROCESSORS, SHARED_BYTES)

    def plan(self, request: PlanRequest, table: ctypes.Array[SwitchSegment], result: PlanResult) -> bool:
        return bool(self._library.fm_sim_plan(ctypes.byref(request), table, ctypes.byref(result)) == 0)

    def launch(self, group: Group, params: SwitchParams) -> None:
        where = group.plan.grid, group.plan.shared_bytes, ctypes.byref(self._options)
        if self._library.fm_sim_switch(*group.numbers, ctypes.byref(params), *where):
            raise BackendError("switch", "simulator", "a launch without faults", self._library.fm_sim_error().decode())
