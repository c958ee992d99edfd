"""The GPU under the micro-benchmarks: kernels compiled by nvcc for it, launches, graphs, samples, clocks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.micro.driver import Driver
from perf.timing import replayed

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "compile_kernels", "find_nvcc"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD_START = 400_000  # cycles that the GPU sleeps while the host queues what is timed, about 0.2 ms


def find_nvcc() -> str:
    """nvcc's path. Raises FileNotFoundError."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return found


def compile_kernels(name: str, architecture: str, directory: Path) -> Path:
    """<name>.cu as a cubin in `directory`, unless it is there already."""
    headers = [HERE / "ptx.cuh", *sorted((ROOT / "cuda/include/fusedmerge/kernel").glob("*.cuh"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [HERE / f"{name}.cu", *headers])).hexdigest()[:12]
    cubin = directory / f"{name}-{architecture}-{digest}.cubin"
    if not cubin.exists():
        directory.mkdir(parents=True, exist_ok=True)
        scratch = cubin.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}", "-cubin"]
        command = [find_nvcc(), *flags, f"-I{ROOT / 'cuda/include'}", "-o", str(scratch), str(HERE / f"{name}.cu")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        scratch.replace(cubin)
    return cubin


class Device:
    """The first CUDA device."""

    where = "cuda"

    def __init__(self) -> None:
        import torch

        torch.zeros(1, device="cuda")  # makes the context
        self.driver = Driver()
        self.name = torch.cuda.get_device_name()
        self.capability = (self.driver.attribute("capability_major"), self.driver.attribute("capability_minor"))
        self.num_multiprocessors = self.driver.attribute("num_multiprocessors")
        self.l2_bytes = self.driver.attribute("l2_bytes")
        self.shared_bytes_per_block = self.driver.attribute("shared_bytes_per_block")
        self.shared_bytes_per_multiprocessor = self.driver.attribute("shared_bytes_per_multiprocessor")

    @property
    def architecture(self) -> str:
        """What nvcc compiles for: 90a, because wgmma is in no other."""
        number = 10 * self.capability[0] + self.capability[1]
        return f"sm_{number}a" if number == 90 else f"sm_{number}"

    @property
    def has_bulk(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        return self.capability == (9, 0)

    def free_bytes(self) -> int:
        import torch

        return torch.cuda.mem_get_info()[0]

    def shared_for(self, blocks: int, least: int = 0) -> int:
        """Dynamic shared memory with which exactly `blocks` blocks fit on a multiprocessor (each has 1 KB of the system's)."""
        share = self.shared_bytes_per_multiprocessor // blocks - 2048
        return max(least, min(share, self.shared_bytes_per_block - 4096))

    @functools.cache  # noqa: B019 - one device lives as long as the process
    def _function(self, file: str, kernel: str) -> int:
        module = self._module(file)
        return self.driver.function(module, kernel, self.shared_bytes_per_block - 4096)

    @functools.cache  # noqa: B019
    def _module(self, file: str) -> int:
        return self.driver.load(compile_kernels(file, self.architecture, ROOT / "build/micro"))

    def launch(
        self, file: str, kernel: str, grid: int, block: int, *arguments: Any, shared_bytes: int = 0, programmatic: bool = False
    ) -> None:
        """Launch a kernel of perf/micro/<file>.cu on torch's current stream. Arguments: tensors, ints (int), structs, ctypes values."""
        values = [a if isinstance(a, (ctypes.Structure, ctypes._SimpleCData)) else _argument(a) for a in arguments]
        self.driver.launch(self._function(file, kernel), grid, block, shared_bytes, self._stream(), values, programmatic)

    def _stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def graph(self, run: Callable[[], Any]) -> Callable[[], None]:
        """A replay of what `run` launches."""
        return replayed(run)

    def samples(self, run: Callable[[], Any], count: int = 15, warmup: int = 3) -> list[float]:
        """Seconds of `count` calls, each between two events, queued while the GPU sleeps."""
        import torch

        for _ in range(warmup):
            run()
        found = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(1e-3 * begin.elapsed_time(end))
        return found

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, Any]]:
        """Clocks and power, read every 20 ms in another thread; the dictionary is filled at the end. Nothing is set."""
        found: dict[str, Any] = {}
        read = _nvml_reader()
        if read is None:
            yield found
            return
        rows: list[tuple[int, int, float]] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.02):
                rows.append(read())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()
        if rows:
            sm, memory, power = zip(*rows, strict=True)
            found.update(sm_mhz=statistics.median(sm), memory_mhz=statistics.median(memory), watts=round(statistics.median(power), 1))


def _argument(value: Any) -> ctypes._SimpleCData[Any]:
    """A tensor's address, nothing, or an int."""
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())


def _nvml_reader() -> Callable[[], tuple[int, int, float]] | None:
    """A function that reads (SM MHz, memory MHz, watts); None where NVML is not to be had."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)

        def read() -> tuple[int, int, float]:
            clock = pynvml.nvmlDeviceGetClockInfo
            power = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
            return clock(handle, pynvml.NVML_CLOCK_SM), clock(handle, pynvml.NVML_CLOCK_MEM), power

        read()
    except Exception:
        return None
    return read


def run_for(seconds: float, run: Callable[[], Any], synchronize: Callable[[], None]) -> None:
    """Call `run` again and again, long enough for clocks and power to settle."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()
        synchronize()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """A struct field's value."""
    return None if tensor is None else tensor.data_ptr()


def pieces(count: int, size: int) -> Sequence[slice]:
    """Slices of `size` that cover `count`."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
