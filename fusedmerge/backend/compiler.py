"""Compiles kernels from the packaged headers with CuPy's NVRTC, and keeps the results on disk.

    kernel, architecture -> key -> in the cache, or compiled into it -> path of a cubin (PTX for a GPU newer than NVRTC)

The key is a hash of the generated source, of every header that it includes, of the flags, the architecture and NVRTC's version. A cached
file's name also holds a hash of its content, so that a damaged one is never loaded. Files are written under another name and renamed:
processes that compile the same kernel at once do no harm.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fusedmerge.backend.params import THREADS
from fusedmerge.errors import BackendError

__all__ = ["ENTRY", "Kernel", "cache_directory", "compiled", "header_root"]

ENTRY = "fusedmerge_kernel"  # the name that every compiled kernel goes by
_FLAGS = ("--std=c++17",)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A kernel to be compiled: the entry's whole body is one call."""

    header: str  # "switch.cuh"
    params: str  # the type of its one argument
    call: str  # the device function, with its template arguments
    name: str = ""  # in cuda/src/kernels.h: what the ahead-of-time library and the simulator know it by
    threads: int = THREADS  # of a block
    blocks: int = 1  # that a multiprocessor is to hold at once

    def source(self) -> str:
        """CUDA C++."""
        bounds = f"FM_KERNEL_OF({self.threads}, {self.blocks})"
        entry = f'extern "C" {bounds} {ENTRY}(const FM_GRID_CONSTANT {self.params} params) {{ {self.call}(params); }}\n'
        return f'#include "fusedmerge/kernel/{self.header}"\nusing namespace fusedmerge;\n{entry}'


def header_root() -> Path:
    """The include directory: the checkout's, or the one that an installation brought along."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "cuda/include"
    return checkout if (checkout / "fusedmerge/kernel").is_dir() else package / "include"


def cache_directory() -> Path:
    """FUSEDMERGE_CACHE_DIR, or `fusedmerge` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedmerge"
    return Path(os.environ.get("FUSEDMERGE_CACHE_DIR") or default).expanduser()


def compiled(kernel: Kernel, capability: tuple[int, int]) -> Path:
    """The kernel for a GPU of this compute capability, as a file that cupy.RawModule(path=...) loads. Raises BackendError."""
    from cupy.cuda import nvrtc

    architecture = _architecture(capability, tuple(nvrtc.getSupportedArchs()))
    flags = (*_FLAGS, f"--gpu-architecture={architecture}")
    key = _key(kernel, flags, nvrtc.getVersion())
    suffix = ".cubin" if architecture.startswith("sm_") else ".ptx"
    found = _lookup(cache_directory(), key, suffix)
    return found or _keep(_compile(kernel, flags), key, suffix)


def _architecture(capability: tuple[int, int], supported: tuple[int, ...]) -> str:
    """Machine code for a GPU that NVRTC knows; for a later one PTX of the newest that it knows, which the driver compiles."""
    number = capability[0] * 10 + capability[1]
    if number in supported:
        return f"sm_{number}"
    older = [arch for arch in supported if arch < number]
    if not older or number < 80:
        raise BackendError("compile", 'backend "jit"', "a GPU of compute capability 8.0 or later", f"{capability[0]}.{capability[1]}")
    return f"compute_{max(older)}"


def _key(kernel: Kernel, flags: tuple[str, ...], version: object) -> str:
    digest = hashlib.sha256(repr((kernel.source(), flags, version)).encode())
    for header in _closure(kernel.header):
        digest.update(f"\n{header.name}\n".encode() + header.read_bytes())
    return digest.hexdigest()[:32]


def _closure(name: str) -> list[Path]:
    """A kernel header and all that it includes, in reading order. Headers include only each other (tests/test_compile.py)."""
    root = header_root() / "fusedmerge/kernel"
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        header = root / waiting.pop(0)
        if header.name in found or not header.is_file():  # the simulator's header is none of a GPU's
            continue
        found[header.name] = header
        waiting += re.findall(r'^\s*#include "([^"]+)"', header.read_text(), re.MULTILINE)
    if name not in found:
        raise BackendError("compile", "kernel headers", f"{name} in the installation", f"none in {root}")
    return list(found.values())


def _content(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _lookup(directory: Path, key: str, suffix: str) -> Path | None:
    for path in directory.glob(f"{key}-*{suffix}"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if path.name == f"{key}-{_content(path.read_bytes())}{suffix}":
                return path
            _logger.warning("%s is damaged and is compiled again", path)
            path.unlink()
    return None


def _keep(code: bytes, key: str, suffix: str) -> Path:
    """Store in the cache; where that cannot be written, in a directory that lives as long as this process."""
    name = f"{key}-{_content(code)}{suffix}"
    try:
        return _write(cache_directory(), name, code)
    except OSError as error:
        _logger.warning("the kernel cache %s cannot be written (%s): every process compiles anew", cache_directory(), error)
        return _write(Path(_own_directory().name), name, code)


def _write(directory: Path, name: str, code: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=directory, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(scratch, directory / name)
    except BaseException:
        os.unlink(scratch)
        raise
    return directory / name


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fusedmerge-")


def _compile(kernel: Kernel, flags: tuple[str, ...]) -> bytes:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(kernel.source(), "fusedmerge.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*flags, f"-I{header_root()}"))
        code = nvrtc.getCUBIN(program) if any("sm_" in flag for flag in flags) else nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise BackendError("compile", "kernel", "source that NVRTC compiles", f"{error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    return bytes(code) if isinstance(code, bytes) else code.encode()
