"""Which backends there are, which can be used here, and which one a device gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusedmerge.backend.cpu import Expert, Segment, TorchSwitch, ordered, wide_factors
from fusedmerge.backend.native import NativeSwitch, add_rows, extension
from fusedmerge.backend.sim import SimSwitch, library, library_path
from fusedmerge.errors import BackendError, InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["Adder", "BackendStatus", "Engine", "Segment", "backends", "choose", "make_adder", "make_engine"]

Engine = NativeSwitch | TorchSwitch | SimSwitch
Adder = Callable[["torch.Tensor", slice], object]

NAMES = ("cpu", "sim", "jit", "aot")
_UNBUILT = "this version of the Python package has no CUDA backend (see docs/status.md)"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here, and with what, or why not. True if it can."""

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable


def backends() -> dict[str, BackendStatus]:
    """What is usable on this machine, and why not: {"cpu": ..., "sim": ..., "jit": ..., "aot": ...}."""
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> BackendStatus:
    if name not in ("cpu", "sim"):
        return BackendStatus(False, _UNBUILT)
    try:
        import torch
    except Exception as error:  # a broken install raises OSError and more
        return BackendStatus(False, f"torch cannot be imported: {error}")
    if name == "sim":
        return _sim_status()
    native = extension()
    kernel = f"compiled kernel ({native.isa()})" if native else "torch's GEMM (the extension is not built)"
    return BackendStatus(True, f"{kernel}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def _sim_status() -> BackendStatus:
    try:
        library()
    except BackendError as error:
        return BackendStatus(False, str(error.got))
    return BackendStatus(True, f"the CUDA kernels on the host simulator, {library_path()}")


def choose(device: torch.device, operation: str) -> str:
    """The backend for tensors on `device`: FUSEDMERGE_BACKEND, or else the one made for it. Raises BackendError with the reason."""
    name = os.environ.get("FUSEDMERGE_BACKEND") or {"cpu": "cpu", "cuda": "aot"}.get(device.type)
    if name is None:
        raise BackendError(operation, "device", "cpu or cuda", device)
    if name not in NAMES:
        raise InvalidValueError(operation, "FUSEDMERGE_BACKEND", f"one of {', '.join(NAMES)}", name)
    status = _status(name)
    if not status:
        raise BackendError(operation, f'backend "{name}" for {device}', "a usable backend", status.reason)
    if name in ("cpu", "sim") and device.type != "cpu":
        raise BackendError(operation, f'backend "{name}"', "weights on the CPU", device)
    return name


def make_engine(name: str, segments: Sequence[Segment]) -> Engine:
    """What runs one Switcher's switches on the backend that `choose` named. cpu: the compiled kernel, or torch where it was not built."""
    if name == "sim":
        return SimSwitch(segments)
    return NativeSwitch(segments) if extension() else TorchSwitch(segments)


def make_adder(experts: Sequence[Expert], device: torch.device) -> Adder | None:
    """A function (block, rows) that adds the experts' rows to a float32 block [rows, cols] on `device`, with the bits that a switch adds.

    None where no expert changes anything. The factors are widened once, here. On the CPU without the extension, and on other devices,
    call it under `exact_products`.
    """
    used = [Expert(e.a.to(device).float().contiguous(), e.b.to(device).float().contiguous(), e.coefficient) for e in ordered(experts)]
    if device.type == "cpu" and extension():
        return (lambda block, rows: add_rows(block, [Expert(e.a, e.b[rows], e.coefficient) for e in used])) if used else None
    factors = wide_factors(used)
    return (lambda block, rows: block.addmm_(factors[1][rows], factors[0])) if factors else None
