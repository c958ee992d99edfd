"""What a decode step costs beside its time: kernels launched and memory, by torch's profiler.

Dynamic adapters are slow for the number of their launches, not for their work (arXiv 2405.17741, section 2).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fusedmerge.backend.kernels import NativeLauncher
from fusedmerge.switcher import Switcher

__all__ = ["count_launches", "peak_memory"]

_NAMESPACES = ("aten", "fusedmerge")
_NOT_LAUNCHED = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "item",
    "_local_scalar_dense",
    "result_type",
    "is_nonzero",
)


def count_launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels that one `call` runs on a GPU, also from inside a CUDA graph.

    On the CPU, which launches none: torch's operations that compute something; views and allocations are left out, and a switch of all
    weights is one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            call()
            torch.cuda.synchronize(device)
        events: Any = kernels.events()
        return sum(1 for event in events if event.device_type.name == "CUDA" and not event.name.startswith("Mem"))
    with _marked(), profile(activities=[ProfilerActivity.CPU]) as operations:
        call()
    events = operations.events()
    return sum(_computing(event) for event in events if event.cpu_parent is None)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the tensors on `device` grow at most while `call` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()  # the profiler warns of what is freed without its having seen the allocation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = peak = 0
    results: Any = found.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _computing(event: Any) -> int:
    """1 for an operation that computes; for anything else, what is inside it."""
    namespace, _, name = event.name.partition("::")
    if namespace in _NAMESPACES and name and not _is_view(namespace, name):
        return 0 if name in _NOT_LAUNCHED else 1
    return sum(map(_computing, event.cpu_children))


@functools.cache
def _is_view(namespace: str, name: str) -> bool:
    """Whether an operation's result is its input's memory (unless it copies inside)."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:  # no torch operation: a mark of ours
        return False
    for overload in packet.overloads():
        returns = getattr(packet, overload)._schema.returns
        if returns and (alias := returns[0].alias_info) is not None and not alias.is_write:
            return True
    return False


@contextmanager
def _marked() -> Iterator[None]:
    """On the CPU a switch and the kernels of fused application run outside torch's sight: each is shown to it as one operation."""

    def shown(kind: type, name: str) -> None:
        original = getattr(kind, name)

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> None:
            with record_function(f"fusedmerge::{name}"):
                original(*args, **options)

        setattr(kind, name, call)
        undo.callback(setattr, kind, name, original)

    with ExitStack() as undo:
        shown(Switcher, "switch")
        shown(NativeLauncher, "launch")
        yield
