"""What the micro-benchmarks need of the CUDA driver: load a cubin, launch a kernel with or without a programmatic edge. ctypes alone.

CuPy's launches take no attributes; `cuLaunchKernelEx` does. torch makes the context, and its current stream is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Driver", "DriverError", "LaunchAttribute", "LaunchConfig"]

ATTRIBUTES = {  # CUdevice_attribute
    "num_multiprocessors": 16,
    "l2_bytes": 38,
    "capability_major": 75,
    "capability_minor": 76,
    "shared_bytes_per_multiprocessor": 81,
    "shared_bytes_per_block": 97,
}
MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; of the value's 64 bytes only the first int is used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class DriverError(RuntimeError):
    """A driver call failed."""


class Driver:
    """libcuda, in the context that torch has made current."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._sizes: dict[int, list[int]] = {}

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def attribute(self, name: str, device: int = 0) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ATTRIBUTES[name], device)
        return value.value

    def load(self, cubin: Path) -> int:
        """A module; it lives as long as the process."""
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin.read_bytes())
        return int(module.value or 0)

    def function(self, module: int, name: str, shared_bytes: int) -> int:
        """A kernel that may use up to `shared_bytes` of dynamic shared memory."""
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module), name.encode())
        self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        return int(function.value or 0)

    def parameter_sizes(self, function: int) -> list[int] | None:
        """Bytes of each of a kernel's parameters; None where the driver is older than 12.4."""
        if not hasattr(self._library, "cuFuncGetParamInfo"):
            return None
        found: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while not self._library.cuFuncGetParamInfo(
            ctypes.c_void_p(function), ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)
        ):
            found.append(size.value)
        return found

    def launch(
        self, function: int, grid: int, block: int, shared_bytes: int, stream: int, arguments: Sequence[Any], programmatic: bool
    ) -> None:
        """Launch; `programmatic`: it may start while the launch before it runs, and waits for it by griddepcontrol."""
        if function not in self._sizes:
            self._sizes[function] = self.parameter_sizes(function) or [ctypes.sizeof(a) for a in arguments]
        given = [ctypes.sizeof(a) for a in arguments]
        if given != self._sizes[function]:
            raise DriverError(f"launch: arguments of {given} bytes, expected {self._sizes[function]}")
        attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        config = LaunchConfig(
            (grid, 1, 1),
            (block, 1, 1),
            shared_bytes,
            stream or None,
            ctypes.pointer(attribute) if programmatic else None,
            int(programmatic),
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self.call("cuLaunchKernelEx", ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
