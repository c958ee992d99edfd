"""A device for the micro-benchmarks where there is none: torch on the CPU, with a twin in place of each kernel."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from perf.micro.device import Device
from perf.micro.session import Sizes

# As small as the kernels' own granules allow.
SMALL = Sizes(
    copy_bytes=8192 * 2048, layers=2, hidden=256, intermediate=512, heads=4, vocabulary=128, context=16, tiles=4, samples=2,
    settle_seconds=0.001,
)  # fmt: skip


def memory(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over what a pointer points to."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * (size * count)).from_address(address), dtype=dtype)


class TwinDriver:
    """In place of the driver: keeps each kernel's argument sizes, and calls its twin."""

    def __init__(self) -> None:
        self.sizes: dict[str, list[int]] = {}
        self.launches: list[tuple[str, int, int, int, bool]] = []
        self.twins: dict[str, Callable[..., None]] = {
            "copy": copy, "read": read, "tiled_copy": tiled_copy, "multiply_copy": multiply_copy, "mma_peak": peak, "wgmma_peak": peak,
            "products_bf16": products_bf16, "products_fp16": products_fp16, "gemv_plain": gemv, "gemv_bulk": gemv, "shrink": shrink,
            "nothing": lambda grid: None,
        }  # fmt: skip

    def launch(
        self, kernel: str, grid: int, block: int, shared_bytes: int, stream: int, arguments: Sequence[Any], programmatic: bool
    ) -> None:
        self.sizes[kernel] = [ctypes.sizeof(a) for a in arguments]
        self.launches.append((kernel, grid, block, shared_bytes, programmatic))
        name = next((name for name in ("tiled_copy", "copy", "read") if kernel.startswith(name + "_")), kernel)
        self.twins[name](grid, *(a if isinstance(a, ctypes.Structure) else a.value for a in arguments))


class TwinDevice(Device):
    """An H100 by its numbers."""

    where = "cpu"

    def __init__(self) -> None:
        self.driver: Any = TwinDriver()
        self.name = "a twin"
        self.capability = (9, 0)
        self.num_multiprocessors = 132
        self.l2_bytes = 50 << 20
        self.shared_bytes_per_block, self.shared_bytes_per_multiprocessor = 232448, 233472

    def free_bytes(self) -> int:
        return 80 << 30

    def _function(self, file: str, kernel: str) -> Any:
        return kernel

    def _stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def graph(self, run: Callable[[], Any]) -> Callable[[], None]:
        return run

    def samples(self, run: Callable[[], Any], count: int = 15, warmup: int = 3) -> list[float]:
        found = []
        for _ in range(min(count, 2)):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found


# ---------------------------------------------------------------------- the kernels' twins


def copy(grid: int, source: int, target: int, nbytes: int, *ahead: int) -> None:
    ctypes.memmove(target, source, nbytes)


def read(grid: int, source: int, sums: int, nbytes: int, *ahead: int) -> None:
    found = memory(sums, grid * 256, torch.int32)
    found.zero_()
    total = int(memory(source, nbytes // 4, torch.int32).sum(dtype=torch.int64)) % (1 << 32)
    found[-1] = total - (1 << 32) if total >= 1 << 31 else total


def tiled_copy(grid: int, p: Any) -> None:
    assert p.rows % p.unit_rows == 0 and p.side_bytes & (p.side_bytes - 1) == 0
    ctypes.memmove(p.target, p.source, p.rows * p.row_bytes)


def multiply_copy(grid: int, p: Any) -> None:
    """The whole copy; products in the first step of the first unit alone, lane by lane as the kernel's fragments have them."""
    assert p.rows % p.unit_rows == 0 and p.b_rows & (p.b_rows - 1) == 0
    ctypes.memmove(p.target, p.source, 2 * p.rows * p.cols)
    if p.coefficient == 0:
        return
    words, b = memory(p.strip, 256 * 128, torch.bfloat16).view(256, 8, 4, 2, 2), memory(p.b, p.b_rows * 128, torch.bfloat16).view(-1, 128)
    target = memory(p.target, p.rows * p.cols, torch.bfloat16).view(p.rows, p.cols)
    sums = target[:64, :256].double()
    for thread in range(256):
        n = thread % 32 // 4
        cols = [thread // 32 * 32 + n // 2 * 8 + 2 * tile + n % 2 for tile in range(4)]
        for piece in range(p.num_slices):
            rows = b[piece // 8 * 64 : piece // 8 * 64 + 64]
            ranks = [piece % 8 * 16 + half * 8 + thread % 4 * 2 + value for half in range(2) for value in range(2)]
            sums[:, cols] += p.coefficient * (rows[:, ranks].double() @ words[thread, piece % 8].reshape(4, 4).double().T)
    target[:64, :256] = sums


def peak(grid: int, words: int, sums: int, iterations: int) -> None:
    assert iterations % 16 == 0
    memory(sums, grid * 256, torch.float32).fill_(float(iterations))


def products(dtype: torch.dtype, grid: int, a: int, b: int, c: int, by_mma: int, by_wgmma: int) -> None:
    wide_a, wide_b = memory(a, grid * 1024, dtype).view(grid, 64, 16).double(), memory(b, grid * 128, dtype).view(grid, 8, 16).double()
    total = wide_a @ wide_b.mT + memory(c, grid * 512, torch.float32).view(grid, 64, 8)
    for target in (by_mma, by_wgmma):
        memory(target, grid * 512, torch.float32).copy_(total.float().flatten())


def products_bf16(grid: int, *arguments: int) -> None:
    products(torch.bfloat16, grid, *arguments)


def products_fp16(grid: int, *arguments: int) -> None:
    products(torch.float16, grid, *arguments)


def gemv(grid: int, p: Any) -> None:
    assert p.rows % 16 == 0 and p.cols % 256 == 0
    total = memory(p.w, p.rows * p.cols, torch.bfloat16).view(p.rows, p.cols).double() @ memory(p.x, p.cols, torch.bfloat16).double()
    if p.b is not None:
        assert p.rank % 8 == 0 and p.rank * p.num_experts <= 128
        b = memory(p.b, p.num_experts * p.rows * p.rank, torch.bfloat16).view(p.num_experts, p.rows, p.rank).double()
        z = memory(p.z, p.num_experts * p.rank, torch.float32).view(p.num_experts, p.rank, 1).double()
        total = total + (b @ z).sum(0)[:, 0]
    memory(p.y, p.rows, torch.bfloat16).copy_(total)


def shrink(grid: int, p: Any) -> None:
    a = memory(p.a, grid * p.cols, torch.bfloat16).view(grid, p.cols).double()
    memory(p.z, grid, torch.float32).copy_(a @ memory(p.x, p.cols, torch.bfloat16).double())
