"""The switch on a GPU by kernels that were compiled ahead of time, with the extension (cuda/src/instances.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fusedmerge.backend.cpu import Segment
from fusedmerge.backend.cuda import CudaSwitch, extension_problem, gpu_problem, load_extension
from fusedmerge.backend.device import Group
from fusedmerge.backend.params import SwitchParams
from fusedmerge.errors import BackendError

__all__ = ["AotSwitch", "problem"]


def problem() -> str | None:
    """Why this backend cannot be used here; None if it can."""
    missing = extension_problem()
    if missing is None and not load_extension().has_cuda():
        missing = "the extension was built without nvcc, and has no kernels"
    return missing or gpu_problem()


class AotSwitch(CudaSwitch):
    """One Switcher's engine on a GPU, through the extension."""

    def __init__(self, segments: Sequence[Segment], report_non_finite: bool = False) -> None:
        super().__init__(segments, report_non_finite, *load_extension().query_device(segments[0].live.device.index))

    def prepare(self, group: Group) -> None:
        import torch

        with torch.cuda.device(self.device):
            _call(load_extension().prepare_switch, group.numbers, group.plan.grid, group.plan.shared_bytes)

    def launch(self, group: Group, params: SwitchParams) -> None:
        import torch

        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            size = group.plan.grid, group.plan.shared_bytes
            _call(load_extension().launch_switch, group.numbers, *size, ctypes.addressof(params), stream)


def _call(function, *arguments) -> None:  # type: ignore[no-untyped-def]
    try:
        function(*arguments)
    except RuntimeError as error:
        raise BackendError("switch", 'backend "aot"', "a launch", error) from error
