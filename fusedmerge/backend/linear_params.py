"""What the host hands to the kernels of fused application: mirrors of cuda/include/fusedmerge/kernel/linear_params.cuh, field by field."""

from __future__ import annotations

import ctypes

__all__ = ["LINEAR_STRUCTS", "RouteParams"]

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class RouteParams(ctypes.Structure):
    """The router's one argument."""

    _fields_ = [
        *((name, _P) for name in ("x", "router", "mask", "ids", "gates")),
        *((name, _L) for name in ("x_stride", "router_stride")),
        *((name, _I) for name in ("cols", "num_adapters", "num_slots", "normalize", "x_aligned", "router_aligned")),
    ]


LINEAR_STRUCTS = (RouteParams,)
