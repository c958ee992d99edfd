"""The switch on the CPU in one call of the compiled extension: every target, every expert, all threads (python/merge_cpu.h).

State. The call cannot be interrupted half way: it runs without the GIL, allocates before its first write, and sets a flag at its end. So
the weights hold the old mixture or the new one, and the flag tells which, whatever interrupts the Python around the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedmerge.backend.cpu import Expert, Segment, difference
from fusedmerge.selection import Mixture

if TYPE_CHECKING:
    import torch

__all__ = ["NativeSwitch", "add_rows", "extension"]


def extension() -> Any:
    """The compiled extension; None where it was not built, or has no vector variant for this processor (torch's GEMM is faster then)."""
    try:
        from fusedmerge import _ext
    except ImportError:
        return None
    return _ext if _ext.isa() != "portable" else None


def _dtype_code(dtype: torch.dtype) -> int:
    return {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}[str(dtype)]


class NativeSwitch:
    """One Switcher's engine. `mixture` is never unknown."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = list(segments)
        self._rows = np.array([_segment_row(s) for s in self._segments], dtype=np.int64)  # [S, 8]
        self._held: Mixture = ()
        self._pending: Mixture | None = None
        self._done = np.zeros(1, dtype=np.int64)  # set by the extension after its last write
        self._forced = False

    @property
    def mixture(self) -> Mixture:
        """What the weights hold."""
        if self._pending is not None and self._done[0]:
            self._bump_versions()
            self._held = self._pending
        self._pending = None
        return self._held

    def apply(self, mixture: Mixture) -> None:
        """Set every segment to `mixture`, at once or not at all."""
        import torch

        held = self.mixture
        if mixture == held and not self._forced:
            return
        exact = self._segments[0].base is not None
        experts, coefficients = self._experts(mixture if exact else difference(mixture, held))
        self._done[0] = 0
        self._pending = mixture
        extension().merge_cpu(self._rows, experts, coefficients, torch.get_num_threads(), done=self._done)
        self._forced = self.mixture != mixture

    def invalidate(self) -> None:
        """Write everything at the next `apply`. In inplace mode there is nothing to write from, and this does nothing."""
        self._forced = self._segments[0].base is not None

    def _experts(self, change: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """The experts' table [E, 6] and coefficients [E]; also notes in each segment's row where its experts end."""
        experts: list[Expert] = []
        for row, segment in zip(self._rows, self._segments, strict=True):
            experts += segment.experts(change)
            row[7] = len(experts)
        return _expert_tables(experts)

    def _bump_versions(self) -> None:
        import torch

        torch.autograd.graph.increment_version([segment.live for segment in self._segments])


def add_rows(block: torch.Tensor, experts: Sequence[Expert]) -> None:
    """block [rows, cols] float32 += sum_e c_e B_e A_e, with the bits that a switch adds. B_e has the block's rows; all rows contiguous."""
    import torch

    table, coefficients = _expert_tables(experts)
    row = np.array([_row(block, block)], dtype=np.int64)
    row[0, 7] = len(table)
    extension().merge_cpu(row, table, coefficients, torch.get_num_threads())


def _segment_row(segment: Segment) -> tuple[int, ...]:
    return _row(segment.live, segment.live if segment.base is None else segment.base)


def _row(live: torch.Tensor, source: torch.Tensor) -> tuple[int, ...]:
    strides = live.stride(0), source.stride(0)
    return (live.data_ptr(), source.data_ptr(), live.shape[0], live.shape[1], *strides, _dtype_code(live.dtype), 0)


def _expert_tables(experts: Sequence[Expert]) -> tuple[np.ndarray, np.ndarray]:
    rows = [(e.a.data_ptr(), e.b.data_ptr(), e.a.stride(0), e.b.stride(0), e.a.shape[0], _dtype_code(e.a.dtype)) for e in experts]
    return np.array(rows, dtype=np.int64).reshape(-1, 6), np.array([e.coefficient for e in experts], dtype=np.float64)
