"""A merge of one matrix in Triton: what a few dozen lines get without this library. One launch per matrix, as such kernels usually are.

    live = round(base + sum over experts e of c_e B_e A_e)        float32 accumulation, one rounding

base, live [rows, cols]; a [N, R, cols], b [N, rows, R] (R a multiple of 16); ids int64 [k], coefficients float32 [k] on the device.
A program computes a tile of 128 x 128. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import triton
import triton.language as tl

import fusedmerge as fm
from perf.subjects import Mixture

if TYPE_CHECKING:
    import torch

    from perf.rivals import Switch

__all__ = ["merge", "switch"]

TILE, DEPTH = 128, 16


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    base, live, a, b, ids, coefficients, rows, cols, rank, num_experts,
    a_adapter_stride, a_row_stride, b_adapter_stride, b_row_stride, base_stride, live_stride,
    tile: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * tile + tl.arange(0, tile)  # rows of the tile
    j = tl.program_id(1) * tile + tl.arange(0, tile)  # columns
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    total = tl.zeros((tile, tile), dtype=tl.float32)
    for e in range(num_experts):
        slot = tl.load(ids + e)
        product = tl.zeros((tile, tile), dtype=tl.float32)
        for start in range(0, rank, depth):
            r = start + tl.arange(0, depth)
            part_b = tl.load(b + slot * b_adapter_stride + i[:, None] * b_row_stride + r[None, :], mask=i[:, None] < rows, other=0.0)
            part_a = tl.load(a + slot * a_adapter_stride + r[:, None] * a_row_stride + j[None, :], mask=j[None, :] < cols, other=0.0)
            product = tl.dot(part_b, part_a, product)
        total += product * tl.load(coefficients + e)
    place = i[:, None].to(tl.int64)
    total += tl.load(base + place * base_stride + j[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(live + place * live_stride + j[None, :], total.to(live.dtype.element_ty), mask=inside)


def merge(base: torch.Tensor, live: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Set `live` to the merge. ids [k] int64 and coefficients [k] float32 are on the weights' device."""
    rows, cols = live.shape
    merge_kernel[triton.cdiv(rows, TILE), triton.cdiv(cols, TILE)](
        base, live, a, b, ids, coefficients, rows, cols, a.shape[1], len(ids),
        a.stride(0), a.stride(1), b.stride(0), b.stride(1), base.stride(0), live.stride(0), TILE, DEPTH,
    )  # fmt: skip


def switch(base: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], bank: fm.AdapterBank) -> Switch:
    """A rival (see perf/rivals.py): the kernel on every matrix in turn."""
    import torch

    where = next(iter(live.values())).device
    scaling = torch.stack([bank.target(name).scaling for name in live])  # [matrices, N]

    def run(mixture: Mixture) -> None:
        ids = torch.tensor([bank.slot(name) for name in mixture]).to(where)
        gates = torch.tensor(list(mixture.values())).to(where)
        coefficients = scaling.index_select(1, ids) * gates  # [matrices, k]
        for index, (name, tensor) in enumerate(live.items()):
            target = bank.target(name)
            merge(
                base[name],
                tensor,
                target.a,
                target.b,
                ids,
                coefficients[index],
            )

    return run
