"""Mirrors of cuda/include/fusedmerge/kernel/sgmv_params.cuh, which gives every field's shape, stride and unit."""

from __future__ import annotations

import ctypes

__all__ = [
    "EXPAND_ALIGNED",
    "EXPAND_COLS",
    "FEW_RANKS",
    "GROUP_TOKENS",
    "MANY_RANKS",
    "MAX_TARGETS",
    "PART_COLS",
    "RANK_STEP",
    "SGMV_STRUCTS",
    "SHRINK_ALIGNED",
    "SHRINK_PAIRS",
    "Y_ALIGNED",
    "GroupParams",
    "Groups",
    "SgmvParams",
    "SgmvTarget",
]

GROUP_TOKENS = 256  # kGroupTokens
SHRINK_PAIRS, PART_COLS = 16, 512  # kShrinkPairs, kPartCols
FEW_RANKS, MANY_RANKS = 16, 64  # kFewRanks, kManyRanks
EXPAND_COLS = 256  # kExpandCols
RANK_STEP = 16  # kRankStep
MAX_TARGETS = 4  # kSgmvTargets
Y_ALIGNED, SHRINK_ALIGNED, EXPAND_ALIGNED = 1, 2, 4  # SgmvFlags

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class Groups(ctypes.Structure):
    """Tokens sorted into groups, on the device."""

    _fields_ = [
        *((name, _P) for name in ("totals", "pairs", "shrink_groups", "tile_tokens", "tile_pairs", "tile_counts")),
        *((name, _I) for name in ("tile_rows", "num_slots")),
    ]


class GroupParams(ctypes.Structure):
    """The argument of the grouping kernels."""

    _fields_ = [
        ("groups", Groups),
        *((name, _P) for name in ("ids", "gates", "counts", "starts", "positions")),
        *((name, _I) for name in ("num_tokens", "num_adapters", "num_indices", "lowest_buckets", "second_buckets", "reserved")),
    ]


class SgmvTarget(ctypes.Structure):
    """One adapted matrix in a launch."""

    _fields_ = [
        *((name, _P) for name in ("y", "a", "b", "scaling", "ranks", "parts", "z", "inverses")),
        *((name, _L) for name in ("y_stride", "a_adapter_stride", "a_row_stride", "b_adapter_stride", "b_row_stride")),
        *((name, _I) for name in ("out", "rank", "z_stride", "flags")),
    ]


class SgmvParams(ctypes.Structure):
    """The argument of shrink, sum and expand."""

    _fields_ = [
        ("groups", Groups),
        ("x", _P),
        ("x_stride", _L),
        *((name, _I) for name in ("cols", "num_pairs", "num_places", "num_parts", "num_targets", "reserved")),
        ("targets", SgmvTarget * MAX_TARGETS),
    ]


SGMV_STRUCTS = (Groups, GroupParams, SgmvTarget, SgmvParams)
