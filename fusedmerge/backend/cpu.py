"""The CPU backend: live = round(source + sum_e c_e B_e A_e), one rounding, a block of rows at a time.

A block is small enough to stay in cache: the source rows are widened to float32 in a reused workspace, one float32 GEMM adds all experts
(their coefficients folded into *float32* copies of B, never into 16-bit factors), and the result is rounded once into the live rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_ELEMENTS", "Expert", "concatenate", "merge_rows", "row_blocks"]

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: fits in the L2 cache of one core beside the factors


@dataclass(frozen=True)
class Expert:
    """One adapter on one target within a mixture."""

    a: torch.Tensor  # [r, cols]
    b: torch.Tensor  # [rows, r]
    coefficient: float  # gate * scaling


def row_blocks(rows: int, cols: int) -> list[slice]:
    """The blocks of rows that `merge_rows` is called with; no block depends on any other."""
    step = max(1, BLOCK_ELEMENTS // max(cols, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def concatenate(experts: Sequence[Expert]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All experts as one pair of float32 factors, a [K, cols] and b [rows, K]; None for no expert (the source's bits are copied)."""
    import torch

    used = [e for e in experts if e.coefficient != 0 and e.a.shape[0] > 0]
    if not used:
        return None
    used.sort(key=lambda e: abs(e.coefficient))
    a = torch.cat([e.a for e in used]).float()
    b = torch.cat([e.b.float().mul_(e.coefficient) if e.b.dtype != torch.float32 else e.b * e.coefficient for e in used], dim=1)
    return a, b


def merge_rows(
    live: torch.Tensor, source: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None, rows: slice, workspace: torch.Tensor
) -> None:
    """live[rows] = round(source[rows] + b[rows] @ a). `workspace` is float32 with at least `block` elements; live may be source."""
    if factors is None:
        live[rows].copy_(source[rows])
        return
    a, b = factors
    block = workspace[: (rows.stop - rows.start) * live.shape[1]].view(-1, live.shape[1])
    block.copy_(source[rows])
    block.addmm_(b[rows], a)
    live[rows].copy_(block)
