"""The switch on the CPU in torch: live = round(source + sum_e c_e B_e A_e), one rounding, a block of rows at a time.

A block is small enough to stay in cache: its source rows are widened to float32 in a reused workspace, one float32 GEMM adds all experts
(their coefficients folded into *float32* copies of B, never into 16-bit factors), and the result is rounded once into the live rows.

State. Each block knows which mixture it holds. A block's only write to a weight is one in-place torch operation, which also bumps the
weight's version counter: after an interruption the counter tells whether the write happened. So every block's mixture is always known,
and the next `apply` finishes or undoes exactly what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusedmerge.errors import InvalidValueError
from fusedmerge.selection import Mixture
from fusedmerge.shared import shared

if TYPE_CHECKING:
    import torch

    from fusedmerge.pristine import Scale
    from fusedmerge.staging import BankTarget

__all__ = [
    "BLOCK_ELEMENTS",
    "TorchSwitch",
    "Expert",
    "Segment",
    "check_finite",
    "difference",
    "exact_products",
    "merge_rows",
    "ordered",
    "row_blocks",
    "wide_factors",
]

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: stays in one core's L2 cache beside the factors


@dataclass(frozen=True)
class Expert:
    """One adapter on one target, within a mixture."""

    a: torch.Tensor  # [r, cols]
    b: torch.Tensor  # [rows, r]
    coefficient: float  # gate * scaling


@dataclass(frozen=True)
class Segment:
    """One target in a switch."""

    live: torch.Tensor  # [rows, cols], the model's own storage
    base: torch.Tensor | None  # [rows, cols], the pristine values; None in inplace mode
    factors: BankTarget
    scale: Scale | None = None  # of an fp8 base

    def experts(self, mixture: Mixture) -> list[Expert]:
        """The mixture's experts on this target, `ordered`."""
        f = self.factors
        ranked = [(slot, f.ranks[slot], gate * f.scalings[slot]) for slot, gate in mixture]
        return ordered(Expert(f.a[slot, :rank], f.b[slot, :, :rank], coefficient) for slot, rank, coefficient in ranked)


def ordered(experts: Iterable[Expert]) -> list[Expert]:
    """The experts that change anything, in ascending order of |coefficient|: one order of addition, whatever the caller wrote."""
    return sorted((e for e in experts if e.coefficient and e.a.shape[0]), key=lambda expert: abs(expert.coefficient))


def check_finite(segments: Iterable[Segment]) -> None:
    """Raise InvalidValueError where a weight holds NaN or infinity. Waits for the device."""
    import torch

    for segment in segments:
        if not bool(torch.isfinite(segment.live).all()):
            raise InvalidValueError("switch", segment.factors.spec.name, "finite values after the switch", "NaN or infinity")


def row_blocks(rows: int, cols: int) -> list[slice]:
    """The blocks of rows that `merge_rows` is called with; no block depends on another."""
    step = max(1, BLOCK_ELEMENTS // max(cols, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def wide_factors(experts: Sequence[Expert]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Experts (`ordered`) as one float32 pair a [K, cols] and b [rows, K] with the coefficients in b; None for no expert."""
    import torch

    if not experts:
        return None
    return torch.cat([e.a for e in experts]).float(), torch.cat([e.b.float() * e.coefficient for e in experts], dim=1)


def merge_rows(
    live: torch.Tensor, source: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None, rows: slice, workspace: torch.Tensor
) -> None:
    """live[rows] = round(source[rows] + b[rows] @ a); without factors the bits are copied. live may be source.

    workspace: float32, at least as many elements as the block. The last operation is the only write to `live`.
    """
    if factors is None:
        live[rows].copy_(source[rows])
        return
    a, b = factors
    block = workspace[: (rows.stop - rows.start) * live.shape[1]].view(-1, live.shape[1])
    block.copy_(source[rows])
    block.addmm_(b[rows], a)
    live[rows].copy_(block)


@shared
@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, whatever the caller chose for its model: bfloat16 or TF32 would spoil the single rounding."""
    kept = _set_precision(None)
    try:
        yield
    finally:
        _set_precision(kept)


def _set_precision(kept: tuple[str, ...] | None) -> tuple[str, ...]:
    """Set float32's own precision (None), or what was kept; returns what was there before."""
    import torch

    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9
        before: tuple[str, ...] = (torch.get_float32_matmul_precision(),)
        torch.set_float32_matmul_precision("highest" if kept is None else kept[0])
        return before
    switches = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = tuple(switch.fp32_precision for switch in switches)
    for switch, precision in zip(switches, kept or ("ieee",) * len(switches), strict=True):
        switch.fp32_precision = precision
    return before


class _Block:
    """Some rows of one segment, and the mixture that they hold."""

    __slots__ = ("mixture", "pending", "rows", "segment")

    def __init__(self, segment: Segment, rows: slice) -> None:
        self.segment = segment
        self.rows = rows
        self.mixture: Mixture | None = ()  # None: unknown (exact mode only), to be written whatever comes
        self.pending: tuple[Mixture, int] | None = None  # (mixture being written, the weight's version before the write)

    def settle(self) -> None:
        """After an interruption: the version counter tells whether the pending write happened."""
        if self.pending is not None:
            mixture, version = self.pending
            if self.segment.live._version != version:
                self.mixture = mixture
            self.pending = None


class TorchSwitch:
    """One Switcher's engine: sets the mixture of all segments. `mixture` is None while blocks differ (an interrupted `apply`)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        import torch

        self._blocks = [[_Block(s, rows) for rows in row_blocks(*s.live.shape)] for s in segments]
        sizes = [(b.rows.stop - b.rows.start) * b.segment.live.shape[1] for blocks in self._blocks for b in blocks]
        self._workspace = torch.empty(max(sizes, default=0), dtype=torch.float32, device="cpu")
        self._forced = False
        self.mixture: Mixture | None = ()

    def apply(self, mixture: Mixture) -> None:
        """Set every segment to `mixture`. An exception leaves a state that the next call repairs."""
        import torch

        if mixture == self.mixture and not self._forced:
            return
        self.mixture = None
        self._forced = False
        with torch.no_grad(), exact_products():
            for blocks in self._blocks:
                self._apply_segment(blocks, mixture)
        self.mixture = mixture

    def _apply_segment(self, blocks: Sequence[_Block], mixture: Mixture) -> None:
        widened: dict[Mixture, tuple[torch.Tensor, torch.Tensor] | None] = {}
        for block in blocks:  # all before any is written: they share the weight's version counter
            block.settle()
        for block in blocks:
            if block.mixture == mixture:
                continue
            segment = block.segment
            source, change = (segment.base, mixture) if segment.base is not None else (segment.live, difference(mixture, block.mixture))
            if change not in widened:
                widened[change] = wide_factors(segment.experts(change))
            block.pending = (mixture, segment.live._version)
            merge_rows(segment.live, source, widened[change], block.rows, self._workspace)
            block.mixture, block.pending = mixture, None

    def invalidate(self) -> None:
        """Write everything at the next `apply`. In inplace mode there is nothing to write from, and this does nothing."""
        for block in (b for blocks in self._blocks for b in blocks if b.segment.base is not None):
            block.mixture, block.pending = None, None
            self._forced = True


def difference(new: Mixture, old: Mixture | None) -> Mixture:
    """new - old as one mixture: an expert in both costs one rounding of its gates' difference, not two passes."""
    gates = dict(new)
    for slot, gate in old or ():
        gates[slot] = gates.get(slot, 0.0) - gate
    return tuple(sorted((slot, gate) for slot, gate in gates.items() if gate != 0))
