"""Launches of named kernels, each with one plain struct as its argument: on the simulator, compiled here (jit), and ahead of time (aot).

    kernel, params, grid, shared bytes -> the current stream of torch's current device

A programmatic launch may start before the stream's last kernel has ended; the kernel waits for it inside. It is a plain launch for code
that was compiled for a compute capability below 9.0, in the simulator, and where the extension was built without nvcc.
"""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from fusedmerge.backend.compiler import ENTRY, Kernel, compiled
from fusedmerge.backend.cuda import launch_by_cupy, load_extension
from fusedmerge.backend.params import SimOptions
from fusedmerge.backend.sim import MULTIPROCESSORS, SHARED_BYTES, library
from fusedmerge.errors import BackendError

if TYPE_CHECKING:
    import torch

__all__ = ["AotLauncher", "JitLauncher", "Launcher", "NativeLauncher", "SimLauncher", "aligned", "launcher"]

_PROGRAMMATIC_VERSION = 90  # kProgrammaticVersion (launch_kernel.cu)


def launcher(backend: str | Launcher, device: torch.device) -> Launcher:
    """What launches kernels on `device`: "sim", "native" (the CPU's own), "jit" or "aot"; a launcher is itself."""
    if not isinstance(backend, str):
        return backend
    if backend in ("sim", "native"):
        return SimLauncher() if backend == "sim" else NativeLauncher()
    return _on_gpu(backend, _ordinal(device))


def aligned(tensor: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    bits, size = tensor.data_ptr(), tensor.element_size()
    for step, count in zip(tensor.stride()[:-1], tensor.shape, strict=False):
        if count > 1:
            bits |= step * size
    return bits % 16 == 0


def _ordinal(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _on_gpu(backend: str, ordinal: int) -> Launcher:
    return {"jit": JitLauncher, "aot": AotLauncher}[backend](ordinal)


class Launcher(ABC):
    """One device's launches."""

    num_multiprocessors: int
    shared_bytes_limit: int  # of a block

    @abstractmethod
    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        """Launch. What `params` points to must live until the kernel has ended, which torch's allocator sees to. Raises BackendError."""


class SimLauncher(Launcher):
    """The host simulator, with CPU tensors. Returns when the kernel has ended."""

    num_multiprocessors = MULTIPROCESSORS
    shared_bytes_limit = SHARED_BYTES

    def __init__(self, options: SimOptions | None = None) -> None:
        self._options = options or SimOptions(thread_order=0, tensor_core=1, async_copies=0, resident_blocks=2, seed=1)

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        lib = library()
        argument = ctypes.byref(params), ctypes.sizeof(params)
        if lib.fm_sim_kernel(kernel.name.encode(), *argument, grid, shared_bytes, ctypes.byref(self._options)):
            raise BackendError(kernel.name, "simulator", "a launch without faults", lib.fm_sim_error().decode())


class NativeLauncher(Launcher):
    """The CPU kernels of the extension (python/linear_cpu.h), which take the CUDA kernels' arguments: those of linear.py alone."""

    num_multiprocessors = 1
    shared_bytes_limit = SHARED_BYTES

    def __init__(self, isa: str = "") -> None:
        self._isa = isa  # "": the best

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        import torch

        load_extension().linear_cpu(kernel.name, grid, ctypes.addressof(params), torch.get_num_threads(), self._isa)


class AotLauncher(Launcher):
    """Kernels that were compiled into the extension."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._edges: dict[str, bool] = {}  # of the kernels that are ready: whether their code takes a programmatic edge
        self.num_multiprocessors, self.shared_bytes_limit = load_extension().query_device(ordinal)

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        import torch

        extension, argument = load_extension(), (ctypes.addressof(params), ctypes.sizeof(params))
        with torch.cuda.device(self._ordinal):
            stream = torch.cuda.current_stream().cuda_stream
            try:
                if kernel.name not in self._edges:
                    self._edges[kernel.name] = extension.prepare_kernel(kernel.name)
                edge = programmatic and self._edges[kernel.name]
                extension.launch_kernel(kernel.name, grid, shared_bytes, edge, *argument, stream)
            except RuntimeError as error:
                raise BackendError(kernel.name, 'backend "aot"', "a launch", error) from error


class JitLauncher(Launcher):
    """Kernels that CuPy compiles here, for this GPU."""

    def __init__(self, ordinal: int) -> None:
        import cupy

        device = cupy.cuda.Device(ordinal)
        self._ordinal = ordinal
        self._capability = divmod(int(device.compute_capability), 10)
        self._functions: dict[Kernel, tuple[Any, bool]] = {}  # and whether the function takes a programmatic edge
        self.num_multiprocessors = device.attributes["MultiProcessorCount"]
        self.shared_bytes_limit = device.attributes["MaxSharedMemoryPerBlockOptin"]

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        import torch

        with torch.cuda.device(self._ordinal):
            function, takes_edge = self._function(kernel)
            stream = torch.cuda.current_stream().cuda_stream
            size = grid, kernel.threads, shared_bytes
            if programmatic and takes_edge and load_extension().has_cuda():  # CuPy's own launch takes no launch attributes
                launch = load_extension().launch_function
                self._call(kernel, launch, kernel.name, function.kernel.ptr, *size, True, ctypes.addressof(params), stream)
            else:
                self._call(kernel, launch_by_cupy, function, params, size, stream)

    def _function(self, kernel: Kernel) -> tuple[Any, bool]:
        if kernel not in self._functions:
            import cupy

            function = cupy.RawModule(path=str(compiled(kernel, self._capability))).get_function(ENTRY)
            function.max_dynamic_shared_size_bytes = self.shared_bytes_limit
            self._functions[kernel] = function, function.ptx_version >= _PROGRAMMATIC_VERSION
        return self._functions[kernel]

    def _call(self, kernel: Kernel, function: Any, *arguments: Any) -> None:
        import cupy

        try:
            function(*arguments)
        except (RuntimeError, cupy.cuda.driver.CUDADriverError) as error:
            raise BackendError(kernel.name, 'backend "jit"', "a launch", error) from error
