"""What the device does at most: the rates that the model predicts with and the rooflines show, measured once per session."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perf.model import Ceilings
from perf.timing import CACHES, Stopwatch, cache_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["measure"]

REPEATS = 9


def measure(where: torch.device) -> Ceilings:
    """Copy and read bandwidth over buffers of four times the cache, the rates of large GEMMs, and the gap between launches in a graph."""
    import torch

    gpu = where.type == "cuda"
    size = max(1 << 30 if gpu else 1 << 27, CACHES * cache_bytes(where))
    source = torch.ones(size // 4, dtype=torch.float32, device=where)
    into = torch.empty_like(source)
    edge = 8192 if gpu else 2048

    def gemm(dtype: torch.dtype) -> float:
        x, y = (torch.randn(edge, edge, device=where).to(dtype) for _ in range(2))
        return 2 * edge**3 / _best(where, lambda: torch.mm(x, y))

    copy = 2 * source.nbytes / _best(where, lambda: into.copy_(source))
    return Ceilings(
        copy=copy,
        read=max(source.nbytes / _best(where, source.sum), copy / 2),  # a CPU's sum may be slower than the reads of its own copy
        flops=gemm(torch.bfloat16),
        flops_float32=gemm(torch.float32),
        launch=_launch_gap() if gpu else 0.0,
    )


def _best(where: torch.device, call: Callable[[], Any]) -> float:
    """The shortest of a few calls: a ceiling is what the device can do, not what it did while something else ran."""
    watch = Stopwatch(where)
    call()
    return min(watch(call) for _ in range(REPEATS))


def _launch_gap(count: int = 1000) -> float:
    """Seconds from one launch to the next in a CUDA graph of launches that do next to nothing."""
    import torch

    x = torch.zeros(1, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return _best(x.device, graph.replay) / count
