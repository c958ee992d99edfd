"""Which backends there are, which can be used here, and which one a device gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusedmerge.backend import aot, jit
from fusedmerge.backend.cpu import Expert, Segment, TorchSwitch, check_finite, ordered, wide_factors
from fusedmerge.backend.device import DeviceSwitch
from fusedmerge.backend.native import NativeSwitch, add_rows, extension
from fusedmerge.backend.sim import SimSwitch, library, library_path
from fusedmerge.errors import BackendError, InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Adder",
    "BackendStatus",
    "DeviceSwitch",
    "Engine",
    "Segment",
    "backends",
    "check_finite",
    "choose",
    "extension",
    "make_adder",
    "make_engine",
]

Engine = NativeSwitch | TorchSwitch | DeviceSwitch
Adder = Callable[["torch.Tensor", slice], object]

NAMES = ("cpu", "sim", "jit", "aot")


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
    if name in ("jit", "aot"):
        return _gpu_status(name)
    try:
        import torch
    except Exception as error:  # a broken install raises OSError and more
        return BackendStatus(False, f"torch cannot be imported: {error}")
    if name == "sim":
        return _sim_status()
    native = extension()
    kernel = f"compiled kernel ({native.isa()})" if native else "torch's GEMM (the extension is not built)"
    return BackendStatus(True, f"{kernel}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def _gpu_status(name: str) -> BackendStatus:
    problem = jit.problem() if name == "jit" else aot.problem()
    if problem:
        return BackendStatus(False, problem)
    import torch

    kernels = "kernels compiled on first use" if name == "jit" else "compiled kernels"
    return BackendStatus(True, f"{kernels}, {torch.cuda.get_device_name()}")


def _sim_status() -> BackendStatus:
    try:
        library()
    except BackendError as error:
        return BackendStatus(False, str(error.got))
    return BackendStatus(True, f"the CUDA kernels on the host simulator, {library_path()}")


def choose(device: torch.device, operation: str) -> str:
    """The backend for tensors on `device`: FUSEDMERGE_BACKEND, or else the first that can be used. Raises BackendError with the reason."""
    given = os.environ.get("FUSEDMERGE_BACKEND")
    if given and given not in NAMES:
        raise InvalidValueError(operation, "FUSEDMERGE_BACKEND", f"one of {', '.join(NAMES)}", given)
    names = (given,) if given else {"cpu": ("cpu",), "cuda": ("aot", "jit")}.get(device.type, ())
    if not names:
        raise BackendError(operation, "device", "cpu or cuda", device)
    statuses = {name: _status(name) for name in names}
    usable = [name for name, status in statuses.items() if status]
    if not usable:
        reasons = "; ".join(f"{name}: {status.reason}" for name, status in statuses.items())
        raise BackendError(operation, f"backend for {device}", f"a usable one of {', '.join(names)}", reasons)
    name = usable[0]
    runs_on = "cpu" if name in ("cpu", "sim") else "cuda"
    if device.type != runs_on:
        raise BackendError(operation, f'backend "{name}"', f"weights on {'the CPU' if runs_on == 'cpu' else 'a GPU'}", device)
    return name


def make_engine(name: str, segments: Sequence[Segment], report_non_finite: bool = False) -> Engine:
    """What runs one Switcher's switches on the backend that `choose` named. cpu: the compiled kernel, or torch where it was not built.

    report_non_finite: have the kernel look for NaN and infinity as it writes (a `DeviceSwitch`'s `check` tells).
    """
    on_device: dict[str, Callable[..., DeviceSwitch]] = {"sim": SimSwitch, "jit": jit.JitSwitch, "aot": aot.AotSwitch}
    if name in on_device:
        return on_device[name](segments, report_non_finite)
    for segment in segments:
        if segment.base is not None and segment.base.dtype != segment.live.dtype:
            expected = f"{segment.live.dtype}, as the weight, on the CPU"
            raise BackendError("Switcher", f"base of {segment.factors.spec.name}", expected, segment.base.dtype)
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
