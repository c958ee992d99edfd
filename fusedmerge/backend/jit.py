"""The switch on a GPU by kernels that CuPy compiles here, for this GPU: specialised by dtypes, mode and depth (`compiler`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedmerge.backend.compiler import ENTRY, Kernel, compiled
from fusedmerge.backend.cpu import Segment
from fusedmerge.backend.cuda import CudaSwitch, extension_problem, gpu_problem, launch_by_cupy
from fusedmerge.backend.device import Group, Numbers
from fusedmerge.backend.params import BF16, FLOAT32, FP8, FP16, THREADS, SwitchParams
from fusedmerge.errors import BackendError

__all__ = ["JitSwitch", "problem", "switch_kernel"]

_TYPES = {BF16: "Bf16", FP16: "Fp16", FLOAT32: "float", FP8: "Fp8E4M3"}


def problem() -> str | None:
    """Why this backend cannot be used here; None if it can."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install 'fusedmerge[cuda13]' (or cuda12)"
    except Exception as error:  # CuPy tells a missing NVRTC in several ways
        return " ".join(f"CuPy finds no NVRTC: {error}".split())
    return extension_problem() or gpu_problem()


def switch_kernel(numbers: Numbers, inplace: bool, resident_chunks: int) -> Kernel:
    """The switch for the dtypes of weight, base and factors."""
    types = ", ".join(_TYPES[number] for number in numbers)
    return Kernel("switch.cuh", "SwitchParams", f"run_switch<{types}, {int(inplace)}, {resident_chunks}>")


class JitSwitch(CudaSwitch):
    """One Switcher's engine on a GPU, through CuPy."""

    def __init__(self, segments: Sequence[Segment], report_non_finite: bool = False) -> None:
        import cupy

        device = cupy.cuda.Device(segments[0].live.device.index)
        self._capability = divmod(int(device.compute_capability), 10)
        self._kernels: dict[Numbers, Any] = {}
        limits = device.attributes["MultiProcessorCount"], device.attributes["MaxSharedMemoryPerBlockOptin"]
        super().__init__(segments, report_non_finite, *limits)

    def prepare(self, group: Group) -> None:
        import cupy
        import torch

        kernel = switch_kernel(group.numbers, group.inplace, group.plan.resident_chunks)
        with torch.cuda.device(self.device):
            function = cupy.RawModule(path=str(compiled(kernel, self._capability))).get_function(ENTRY)
            function.max_dynamic_shared_size_bytes = group.plan.shared_bytes
        self._kernels[group.numbers] = function

    def launch(self, group: Group, params: SwitchParams) -> None:
        import cupy
        import torch

        size = group.plan.grid, THREADS, group.plan.shared_bytes
        with torch.cuda.device(self.device):
            try:
                launch_by_cupy(self._kernels[group.numbers], params, size, torch.cuda.current_stream().cuda_stream)
            except cupy.cuda.driver.CUDADriverError as error:
                raise BackendError("switch", 'backend "jit"', "a launch", error) from error
