"""Fused application for many tokens: each token's own mixture of adapters added to a linear's result (docs/kernels/sgmv.md).

    group_tokens(ids, gates), once for all layers that share them -> add_adapters(y, x, a, b, ...); add_to_targets: linears that share x

Tensors are checked by the caller (fusedmerge/ops): of one device, x, y, a and b of one 16-bit dtype, their last dimension contiguous.
Nothing waits for the device, and every size that the host uses is a bound that it knows, so a CUDA graph may hold the calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fusedmerge.backend.compiler import Kernel
from fusedmerge.backend.kernels import Launcher, aligned, launcher
from fusedmerge.backend.params import MAX_SLOTS
from fusedmerge.backend.sgmv_params import (
    EXPAND_ALIGNED,
    EXPAND_COLS,
    FEW_RANKS,
    GROUP_TOKENS,
    MANY_RANKS,
    MAX_TARGETS,
    PART_COLS,
    RANK_STEP,
    SHRINK_ALIGNED,
    SHRINK_PAIRS,
    Y_ALIGNED,
    GroupParams,
    SgmvParams,
    SgmvTarget,
)
from fusedmerge.backend.sgmv_params import Groups as DeviceGroups
from fusedmerge.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_ADAPTERS", "Groups", "Target", "add_adapters", "add_to_targets", "group_tokens"]

MAX_ADAPTERS = 4096  # N of one call: a grouping block counts them in shared memory
_WARPS = 8  # of a block
_MAX_TILE_ROWS = 96
_MAX_TILE_SLOTS = 1024  # a tile's slots are ordered by counting
_SMALL_PAIRS = 4 * GROUP_TOKENS  # of a batch that one block groups; beyond, tiles are better ordered by a block each
_ROW_BYTES = 4 * EXPAND_COLS  # of shared memory for a row of a tile
_MAX_BUCKETS = 64  # squared: MAX_ADAPTERS
_WAVES = 32  # blocks of a grid for each multiprocessor at most; blocks walk the rest


@dataclass(frozen=True)
class Groups:
    """Tokens sorted by expert on the device: what `group_tokens` made of ids and gates. Valid for any layer with the same tokens."""

    device: DeviceGroups
    memory: torch.Tensor  # int32: what `device` points to
    num_tokens: int  # T
    num_slots: int  # k
    num_adapters: int  # N
    buckets: tuple[int, int]  # of a token's lowest and second lowest expert: tokens are ordered by them

    @property
    def num_pairs(self) -> int:
        """How many (token, expert) pairs there may be."""
        return self.num_tokens * self.num_slots

    @property
    def max_groups(self) -> int:
        """How many groups of SHRINK_PAIRS pairs of one expert there may be."""
        return self.num_pairs // SHRINK_PAIRS + min(self.num_adapters, self.num_pairs)

    @property
    def max_tiles(self) -> int:
        """How many tiles of tokens there may be."""
        return _ceil(self.num_tokens, self.device.tile_rows)

    @property
    def num_places(self) -> int:
        """Places of pairs in all tiles."""
        return self.max_tiles * self.device.tile_rows * self.num_slots


class Target(NamedTuple):
    """One adapted matrix: y += B (A x)."""

    y: torch.Tensor  # [T, out], changed in place; may be columns of a wider tensor
    a: torch.Tensor  # [N, r, in]
    b: torch.Tensor  # [N, out, r]
    scaling: torch.Tensor | None = None  # float32 [N]; None: 1 each
    ranks: torch.Tensor | None = None  # int32 [N], at most r; None: r each. Beyond an adapter's rank nothing is read


def group_tokens(backend: str | Launcher, ids: torch.Tensor, gates: torch.Tensor, num_adapters: int) -> Groups:
    """Sort tokens by expert, on the device: four launches, or one for up to 256 tokens with 1024 slots in all.

    ids int32 [T, k] (outside [0, N): no expert), gates float32 [T, k], both contiguous. A token's equal ids count once, with the sum of
    their gates; a sum of 0 is no expert. Raises InvalidValueError for more than MAX_ADAPTERS adapters or MAX_SLOTS slots.
    """
    import torch

    num_tokens, num_slots = ids.shape
    for field, most, got in (("a", MAX_ADAPTERS, num_adapters), ("ids", MAX_SLOTS, num_slots)):
        if got > most:
            what = "adapters" if field == "a" else "slots of a token"
            raise InvalidValueError("lora_linear", field, f"at most {most} {what} (on this backend)", got)
    on = launcher(backend, ids.device)
    rows = _tile_rows(num_tokens, num_slots, on.shared_bytes_limit)
    buckets = _buckets(num_tokens, num_slots, num_adapters, rows)
    groups = Groups(DeviceGroups(tile_rows=rows, num_slots=num_slots), ids, num_tokens, num_slots, num_adapters, buckets)
    indices = max(num_adapters, buckets[0] * buckets[1])
    pairs, chunks = groups.num_pairs, _ceil(num_tokens, GROUP_TOKENS)
    if pairs * num_adapters == 0:
        return groups
    sizes = {"num_tokens": num_tokens, "num_adapters": num_adapters, "num_indices": indices}
    params = GroupParams(ids=ids.data_ptr(), gates=gates.data_ptr(), **sizes, lowest_buckets=buckets[0], second_buckets=buckets[1])
    shared = [("totals", 4), ("pairs", 4 * pairs), ("shrink_groups", 4 * groups.max_groups)]
    shared += [("tile_tokens", num_tokens), ("tile_pairs", 4 * groups.num_places), ("tile_counts", groups.max_tiles)]
    own = [("counts", 2 * chunks * indices), ("starts", 4 * indices), ("positions", pairs)]
    memory = torch.empty(sum(_ceil(size, 4) * 4 for _, size in shared + own), dtype=torch.int32, device=ids.device)
    at = memory.data_ptr()
    for name, size in shared + own:
        setattr(groups.device if (name, size) in shared else params, name, at)
        at += _ceil(size, 4) * 16
    params.groups = groups.device
    place_bytes, scan_bytes = 8 * GROUP_TOKENS * (num_slots + 1), 16 * GROUP_TOKENS
    if chunks == 1 and pairs <= _SMALL_PAIRS:
        on.launch(_kernel("group_small"), params, 1, place_bytes + max(8 * indices, scan_bytes))
    else:
        on.launch(_kernel("group_histogram"), params, chunks, place_bytes + 8 * indices)
        on.launch(_kernel("group_scan"), params, 1, scan_bytes, programmatic=True)
        on.launch(_kernel("group_scatter"), params, chunks, place_bytes + 8 * indices, programmatic=True)
        on.launch(_kernel("group_tiles"), params, groups.max_tiles, 4 * rows * num_slots, programmatic=True)
    return replace(groups, memory=memory)


def add_adapters(
    backend: str | Launcher,
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    scaling: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> None:
    """y[t] += sum_j gates[t, j] * scaling[ids[t, j]] * B[ids[t, j]] (A[ids[t, j]] x[t]), with one rounding.

    y [T, out], x [T, in], a [N, r, in], b [N, out, r], ids int32 [T, k], gates float32 [T, k], scaling float32 [N]; `groups`: what
    `group_tokens` made of these ids and gates for these N. Raises as `group_tokens` and `add_to_targets`.
    """
    add_to_targets(backend, x, [Target(y, a, b, scaling)], groups or group_tokens(backend, ids, gates, len(a)))


def add_to_targets(backend: str | Launcher, x: torch.Tensor, targets: Sequence[Target], groups: Groups) -> None:
    """The same for several matrices that share x [T, in] (q, k, v; gate, up): two or three launches for each MAX_TARGETS of them.

    Raises InvalidValueError where `groups` were made for other tokens or adapters.
    """
    import torch

    for target in targets:
        if (len(x), len(target.a)) != (groups.num_tokens, groups.num_adapters):
            expected = f"those of {len(x)} tokens and {len(target.a)} adapters"
            raise InvalidValueError("lora_linear", "groups", expected, f"{groups.num_tokens} and {groups.num_adapters}")
    targets = [target for target in targets if target.a.numel() and target.b.numel()]
    if not targets or not groups.num_pairs:
        return
    torch.autograd.graph.increment_version([target.y for target in targets])
    on = launcher(backend, x.device)
    for first in range(0, len(targets), MAX_TARGETS):
        _launch(on, x, targets[first : first + MAX_TARGETS], groups)


def _launch(on: Launcher, x: torch.Tensor, targets: Sequence[Target], groups: Groups) -> None:
    import torch

    ranks = [target.a.shape[1] for target in targets]
    held = FEW_RANKS if max(ranks) <= FEW_RANKS else MANY_RANKS
    rank_blocks = sum(_ceil(rank, held) for rank in ranks)
    parts = _ceil(x.shape[1], PART_COLS)
    if _ceil(groups.num_pairs, _WARPS * SHRINK_PAIRS) * rank_blocks >= 2 * on.num_multiprocessors:
        parts = 1  # enough blocks without: each adds its parts itself
    strides = [_ceil(rank, RANK_STEP) * RANK_STEP for rank in ranks]
    params = SgmvParams(groups.device, x.data_ptr(), x.stride(0), x.shape[1], groups.num_pairs, groups.num_places, parts, len(targets))
    pairs, places = groups.num_pairs if parts > 1 else 0, groups.num_places
    sizes = [(parts * pairs * stride, places * stride, places * _ceil(stride, MANY_RANKS)) for stride in strides]  # parts, z, inverses
    z = torch.empty(sum(map(sum, sizes)), dtype=torch.float32, device=x.device)
    at = z.data_ptr()
    for i, (target, z_stride) in enumerate(zip(targets, strides, strict=True)):
        params.targets[i] = _describe(target, x, z_stride)
        for name, size in zip(("parts", "z", "inverses"), sizes[i], strict=True):
            setattr(params.targets[i], name, at)
            at += 4 * size
    waves = _WAVES * on.num_multiprocessors
    on.launch(_kernel("sgmv_shrink", x.dtype, held), params, min(_ceil(groups.max_groups, _WARPS) * rank_blocks * parts, waves), 0)
    if parts > 1:
        on.launch(_kernel("sgmv_sum", x.dtype), params, min(_ceil(groups.num_pairs * max(strides), 1024), waves), 0, programmatic=True)
    strips = sum(_ceil(target.b.shape[1], EXPAND_COLS) for target in targets)
    shared_bytes = groups.device.tile_rows * _ROW_BYTES
    on.launch(_kernel("sgmv_expand", x.dtype, held), params, min(groups.max_tiles * strips, waves), shared_bytes, programmatic=True)


def _describe(target: Target, x: torch.Tensor, z_stride: int) -> SgmvTarget:
    y, a, b, scaling, ranks = target
    return SgmvTarget(
        y=y.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        scaling=None if scaling is None else scaling.data_ptr(),
        ranks=None if ranks is None else ranks.data_ptr(),
        y_stride=y.stride(0),
        a_adapter_stride=a.stride(0),
        a_row_stride=a.stride(1),
        b_adapter_stride=b.stride(0),
        b_row_stride=b.stride(1),
        out=b.shape[1],
        rank=a.shape[1],
        z_stride=z_stride,
        flags=aligned(y) * Y_ALIGNED | (aligned(x) and aligned(a)) * SHRINK_ALIGNED | aligned(b) * EXPAND_ALIGNED,
    )


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _tile_rows(num_tokens: int, num_slots: int, shared_bytes_limit: int) -> int:
    """Tokens of a tile: as many as leave room for two blocks on a multiprocessor; fewer for a small batch, so that it fills the device."""
    most = min(_MAX_TILE_ROWS, _MAX_TILE_SLOTS // max(num_slots, 1), shared_bytes_limit // (2 * _ROW_BYTES))
    return max(8, min(most, _ceil(num_tokens, 16)) // 8 * 8)


def _buckets(num_tokens: int, num_slots: int, num_adapters: int, tile_rows: int) -> tuple[int, int]:
    """With one expert a token, one bucket each. Else as many keys as give a tile's tokens the same two buckets, about four keys a tile."""
    if num_slots == 1:
        return num_adapters, 1
    count = min(num_adapters, _MAX_BUCKETS, max(1, math.isqrt(4 * _ceil(num_tokens, tile_rows))))
    return count, count


def _kernel(name: str, dtype: torch.dtype | None = None, ranks: int | None = None) -> Kernel:
    """As cuda/src/kernels_sgmv.cu names them; ranks: those that a warp holds."""
    params = "GroupParams" if name.startswith("group") else "SgmvParams"
    if dtype is None:
        return Kernel("sgmv.cuh", params, f"run_{name}", name)
    suffix, number = {"torch.bfloat16": ("bf16", "Bf16"), "torch.float16": ("fp16", "Fp16")}[str(dtype)]
    if ranks is None:
        return Kernel("sgmv.cuh", params, f"run_{name}<{number}>", f"{name}_{suffix}")
    blocks = 2 if name == "sgmv_expand" or ranks == FEW_RANKS else 1
    return Kernel("sgmv.cuh", params, f"run_{name}<{number}, {ranks}>", f"{name}_{suffix}_{ranks}", blocks=blocks)
