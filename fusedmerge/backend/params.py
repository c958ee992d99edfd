"""What the host hands to the kernels, the planner and the simulator: mirrors of the C structs, field by field.

Shapes, strides and units of every field: cuda/include/fusedmerge/kernel/params.cuh and cuda/src/plan.h. A library states the layout that
it was compiled with, and `layout` states this module's in the same words, so that the two are compared as text.
"""

from __future__ import annotations

import ctypes

from fusedmerge.backend.linear_params import LINEAR_STRUCTS
from fusedmerge.backend.sgmv_params import SGMV_STRUCTS

__all__ = [
    "BAD_GATE",
    "BAD_ID",
    "BF16",
    "FLOAT32",
    "FP16",
    "FP8",
    "MAX_SLOTS",
    "NON_FINITE",
    "PlanRequest",
    "PlanResult",
    "SHARED_STRUCTS",
    "SimOptions",
    "SwitchParams",
    "SwitchSegment",
    "SwitchState",
    "THREADS",
    "layout",
]

BF16, FP16, FLOAT32, FP8 = 0, 1, 2, 3  # Number (cuda/src/numbers.h)
BAD_ID, BAD_GATE, NON_FINITE = 1, 2, 4  # SwitchStatus
MAX_SLOTS = 32  # kMaxSlots
THREADS = 256  # kThreads

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class SwitchSegment(ctypes.Structure):
    """One adapted matrix in a launch."""

    _fields_ = [
        *((name, _P) for name in ("live", "source", "a", "b", "scaling", "ranks", "source_scale")),
        *((name, _L) for name in ("live_stride", "source_stride", "a_adapter_stride", "a_row_stride", "b_adapter_stride", "b_row_stride")),
        *((name, _L) for name in ("scale_stride", "first_unit")),
        *((name, _I) for name in ("rows", "cols", "rank", "scale_row_shift", "scale_col_shift", "unit_rows", "flags", "reserved")),
    ]


class SwitchState(ctypes.Structure):
    """Device memory of one switcher: the mixture that was last applied."""

    _fields_ = [
        *((name, _I) for name in ("valid", "num_last", "ticket", "status")),
        ("last_ids", _I * MAX_SLOTS),
        ("last_gates", ctypes.c_float * MAX_SLOTS),
    ]


class SwitchParams(ctypes.Structure):
    """The kernel's one argument."""

    _fields_ = [
        *((name, _P) for name in ("segments", "state", "ids", "gates")),
        ("num_units", _L),
        *((name, _I) for name in ("num_segments", "num_slots", "num_adapters", "inplace", "check_finite", "resident_chunks")),
    ]


class PlanRequest(ctypes.Structure):
    """What the planner is asked."""

    _fields_ = [
        *((name, _I) for name in ("live", "source", "factor", "inplace", "num_segments", "num_adapters", "num_slots")),
        *((name, _I) for name in ("num_multiprocessors", "shared_bytes_limit", "unit_rows")),
    ]


class PlanResult(ctypes.Structure):
    """What the planner answers, beside the fields that it fills in the segments."""

    _fields_ = [
        *((name, _L) for name in ("num_units", "live_bytes", "source_bytes", "adapter_bytes", "bank_bytes", "table_bytes")),
        *((name, _I) for name in ("grid", "shared_bytes", "resident_chunks")),
        ("error", ctypes.c_char * 256),
    ]


class SimOptions(ctypes.Structure):
    """thread_order: 0 forward, 1 reverse, 2 shuffled; tensor_core: 0 A100, 1 H100; async_copies: 0 late, 1 early, 2 random."""

    _fields_ = [*((name, _I) for name in ("thread_order", "tensor_core", "async_copies", "resident_blocks")), ("seed", ctypes.c_uint)]


_SWITCH_STRUCTS = (SwitchSegment, SwitchState, SwitchParams, PlanRequest, PlanResult)
SHARED_STRUCTS = (*_SWITCH_STRUCTS, *SGMV_STRUCTS, *LINEAR_STRUCTS)  # the extension has these too


def layout(structs: tuple[type[ctypes.Structure], ...] = (*SHARED_STRUCTS, SimOptions)) -> str:
    """A line "Struct.field offset size" for each field."""
    described = [(f"{struct.__name__}.{name}", getattr(struct, name)) for struct in structs for name, *_ in struct._fields_]
    return "".join(f"{name} {field.offset} {field.size}\n" for name, field in described)
