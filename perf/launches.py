"""The kernels' launches as the library makes them, noted by a launcher instead of run, on tensors that have no memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from fusedmerge.backend import jit, linear, params, sgmv
from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.cuda import load_extension
from fusedmerge.backend.kernels import Launcher
from perf.backbones import LLAMA_2_7B

__all__ = ["MULTIPROCESSORS", "Launch", "launches"]

MULTIPROCESSORS, TOKENS, FEW_TOKENS, ADAPTERS, SLOTS, RANK, FEW_RANKS = 132, 4096, 64, 8, 2, 64, 16


@dataclass(frozen=True)
class Launch:
    """One kernel, as the library launches it."""

    name: str
    kernel: Kernel
    grid: int
    shared: int  # dynamic, bytes

    @property
    def asked(self) -> int:
        """Blocks that the grid has for each multiprocessor."""
        return -(-self.grid // MULTIPROCESSORS)


class Recorder(Launcher):
    """Notes launches on tensors that have no memory."""

    num_multiprocessors = MULTIPROCESSORS

    def __init__(self, shared_bytes_limit: int) -> None:
        self.shared_bytes_limit = shared_bytes_limit
        self.launches: list[Launch] = []

    def launch(self, kernel: Kernel, params: ctypes.Structure, grid: int, shared_bytes: int, programmatic: bool = False) -> None:
        self.launches.append(Launch(kernel.name, kernel, grid, shared_bytes))


def launches(shared_bytes_limit: int) -> list[Launch]:
    """Every kernel once: a layer of Llama-2-7B, top-2 of 8 adapters of rank 64, bf16; 1, 16 and 4096 tokens; for the latter rank 16, too;
    64 tokens are grouped, too."""
    import torch

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    note, hidden = Recorder(shared_bytes_limit), LLAMA_2_7B.hidden
    a, b, weight = empty(ADAPTERS, RANK, hidden), empty(ADAPTERS, hidden, RANK), empty(hidden, hidden)
    linear.route(note, empty(1, hidden), empty(ADAPTERS, hidden), SLOTS)
    for count in (1, 16):
        known = linear.Known(empty(count, SLOTS, dtype=torch.int32), empty(count, SLOTS, dtype=torch.float32))
        linear.decode_group(note, empty(count, hidden), [linear.Target(weight, a, b)] * 3, known)
    x = empty(TOKENS, hidden)
    for count in (FEW_TOKENS, TOKENS):
        groups = sgmv.group_tokens(note, empty(count, SLOTS, dtype=torch.int32), empty(count, SLOTS, dtype=torch.float32), ADAPTERS)
    for rank in (RANK, FEW_RANKS):
        target = sgmv.Target(empty(TOKENS, hidden), empty(ADAPTERS, rank, hidden), empty(ADAPTERS, hidden, rank))
        sgmv.add_to_targets(note, x, [target], groups)
    once = {launch.name: launch for launch in note.launches}
    bf16, fp8, wide = (params.BF16,) * 3, (params.BF16, params.FP8, params.BF16), (params.BF16, params.BF16, params.FLOAT32)
    ways = {"exact": (bf16, False), "in place": (bf16, True), "fp8 base": (fp8, False), "float32 factors": (wide, False)}
    return [*(_switch(f"switch, {way}", *how, shared_bytes_limit) for way, how in ways.items()), *once.values()]


def _switch(name: str, numbers: tuple[int, int, int], inplace: bool, shared_bytes_limit: int) -> Launch:
    """As the planner has it for one layer."""
    shapes = LLAMA_2_7B.shapes[:7]
    segments, plan = (params.SwitchSegment * len(shapes))(), params.PlanResult()
    for segment, (rows, cols) in zip(segments, shapes, strict=True):
        segment.rows, segment.cols, segment.rank, segment.b_row_stride = rows, cols, RANK, RANK
        segment.live = segment.source = segment.a = segment.b = segment.scaling = 4096
        segment.live_stride = segment.source_stride = segment.a_row_stride = cols
        segment.scale_row_shift = segment.scale_col_shift = 31
    request = params.PlanRequest(*numbers, inplace, len(shapes), ADAPTERS, SLOTS, MULTIPROCESSORS, shared_bytes_limit)
    if not load_extension().plan_switch(*map(ctypes.addressof, (request, segments, plan))):
        raise RuntimeError(plan.error.decode())
    return Launch(name, jit.switch_kernel(numbers, inplace, plan.resident_chunks), plan.grid, plan.shared_bytes)
