"""What the host hands to the kernels of fused application: mirrors of cuda/include/fusedmerge/kernel/linear_params.cuh, field by field."""

from __future__ import annotations

import ctypes

__all__ = [
    "LINEAR_STRUCTS",
    "MAX_TARGETS",
    "MAX_TOKENS",
    "SPLIT_COLS",
    "MMA_ROWS",
    "TILE_ROWS",
    "Z_PITCH_STEP",
    "LinearParams",
    "LinearTarget",
    "RouteParams",
]

MAX_TOKENS, MAX_TARGETS = 16, 4  # kMaxTokens, kMaxTargets
MMA_ROWS, TILE_ROWS, SPLIT_COLS, Z_PITCH_STEP = 16, 32, 2048, 8  # kMmaRows, kTileRows, kSplitCols, kZPitchStep
WEIGHT_ALIGNED, A_ALIGNED, B_ALIGNED = 1, 2, 4  # TargetFlags
X_ALIGNED, INPUT_ALIGNED, SECOND_ALIGNED, NORM_ALIGNED, SUM_ALIGNED, ROUTER_ALIGNED = 1, 2, 4, 8, 16, 32  # SourceFlags
ROUTER_WIDE = 64  # kRouterWide
PLAIN, NORM, SILU = 0, 1, 2  # SourceKind

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


class RouteParams(ctypes.Structure):
    """The router's one argument."""

    _fields_ = [
        *((name, _P) for name in ("x", "router", "mask", "ids", "gates")),
        *((name, _L) for name in ("x_stride", "router_stride")),
        *((name, _I) for name in ("cols", "num_adapters", "num_slots", "normalize", "flags", "reserved")),
    ]


class LinearTarget(ctypes.Structure):
    """One matrix of the group that shares x, with its adapters."""

    _fields_ = [
        *((name, _P) for name in ("weight", "a", "b", "scaling", "bias", "residual", "y", "z")),
        *((name, _L) for name in ("weight_stride", "a_adapter_stride", "a_row_stride", "b_adapter_stride", "b_row_stride")),
        *((name, _L) for name in ("residual_stride", "y_stride")),
        *((name, _I) for name in ("rows", "rank", "z_pitch", "first_tile", "first_rank_tile", "routing", "flags", "reserved")),
    ]


class LinearParams(ctypes.Structure):
    """The one argument of prologue and GEMV."""

    _fields_ = [
        ("targets", LinearTarget * MAX_TARGETS),
        ("routers", _P * MAX_TARGETS),
        ("router_strides", _L * MAX_TARGETS),
        *((name, _P) for name in ("x", "input", "second", "norm_weight", "sum", "ids", "gates", "logits")),
        *((name, _L) for name in ("x_stride", "input_stride", "second_stride", "sum_stride")),
        ("epsilon", _F),
        *((name, _I) for name in ("source", "tokens", "cols", "num_targets", "num_tiles", "num_rank_tiles", "num_splits")),
        *((name, _I) for name in ("num_adapters", "num_routings", "num_slots", "normalize", "flags", "reserved")),
    ]


LINEAR_STRUCTS = (RouteParams, LinearTarget, LinearParams)
