"""Safetensors files a piece at a time: headers without their tensors, and files larger than memory written from front to back.

A file is: uint64 header length (little endian), JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). Plain reads, no mmap: mapped pages count as the process's memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from fusedmerge.errors import FormatError

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["Entry", "Header", "Layout", "StreamWriter", "itemsize", "read_chunks", "read_header", "read_into", "torch_dtype"]

_MAX_HEADER = 100_000_000  # the reference implementation's own limit
_CHUNK = 4 << 20  # bytes
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # what a merge can read or write

Layout = tuple[str, str, tuple[int, ...]]  # (name, dtype code, shape) of a tensor to be written


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    name: str
    dtype: str  # safetensors' own code: "BF16", ...
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    nbytes: int


@dataclass(frozen=True)
class Header:
    """One file's tensors, in the order of their bytes, and its metadata."""

    path: Path
    data: int  # where the tensors' bytes begin
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def torch_dtype(code: str) -> torch.dtype | None:
    """The floating dtype of a code; None for integers, float8 and whatever else is only copied."""
    import torch

    return getattr(torch, _TORCH[code]) if code in _TORCH else None


def itemsize(code: str) -> int:
    """Bytes per element; 1 for codes that are not known."""
    return _BITS.get(code, 8) // 8


def read_header(path: Path, operation: str) -> Header:
    """Read and check a header. Raises FormatError for a file that is not safetensors, or cut short, or with gaps or twins in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):  # an empty header is "{}"
            raise FormatError(operation, str(path), "a safetensors file", f"{size} bytes that begin with {prefix!r}")
        text = file.read(length)
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
        metadata = fields.pop("__metadata__", None) or {}
        entries = [_entry(name, field, 8 + length) for name, field in fields.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(operation, str(path), "a safetensors header", f"{type(error).__name__}: {error}") from error
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise FormatError(operation, f"{path}: {entry.name}", f"bytes from {end}, without a gap", f"from {entry.start}")
        end += entry.nbytes
    if end != size:
        raise FormatError(operation, str(path), f"{end} bytes, as its header says", f"{size} (was the file cut short?)")
    return Header(path, 8 + length, {entry.name: entry for entry in entries}, {str(k): str(v) for k, v in metadata.items()})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries named {next(name for name in names if names.count(name) > 1)}")
    return found


def _entry(name: str, field: Mapping[str, Any], data: int) -> Entry:
    start, end = field["data_offsets"]
    shape = tuple(field["shape"])
    if not all(isinstance(x, int) and x >= 0 for x in (start, end, *shape)):
        raise ValueError(f"{name}: offsets {start} to {end}, shape {list(shape)}")
    code = str(field["dtype"])
    if end < start or (code in _BITS and math.prod(shape) * itemsize(code) != end - start):
        raise ValueError(f"{name}: {end - start} bytes for {code} of shape {list(shape)}")
    return Entry(name, code, shape, data + start, end - start)


def read_into(file: BinaryIO, offset: int, into: memoryview, operation: str) -> None:
    """Fill `into` from the file's bytes at `offset`. Raises FormatError where the file ends before."""
    file.seek(offset)
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            raise FormatError(operation, file.name, f"{len(into)} bytes at {offset}", f"{done} (the file changed while it was read)")
        done += count


def read_chunks(file: BinaryIO, entry: Entry, operation: str) -> Iterator[memoryview]:
    """A tensor's bytes, piece by piece; each piece is overwritten by the next."""
    buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
    for done in range(0, entry.nbytes, _CHUNK):
        block = buffer[: min(_CHUNK, entry.nbytes - done)]
        read_into(file, entry.start + done, block, operation)
        yield block


class StreamWriter:
    """Writes a file from front to back: first the header, then the tensors' bytes in the order of `tensors`.

    The file appears under its name when it is whole and on disk; until then, and after an exception, it is `<name>.tmp`.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[Layout, int]], metadata: Mapping[str, str]) -> None:
        """tensors: ((name, dtype code, shape), bytes) each."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for (name, code, shape), nbytes in tensors:
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        self._path, self._tmp, self._left = path, path.with_name(path.name + ".tmp"), end
        self._file = self._tmp.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> Self:
        return self

    def write(self, data: memoryview) -> None:
        """Append the next bytes."""
        self._left -= data.nbytes
        self._file.write(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._abandon()
            return
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._left:
            raise AssertionError(f"{self._path}: {self._left} bytes of the header's tensors were not written")
        os.replace(self._tmp, self._path)

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes; on a full disk that fails again, and the first error is the one to report
            self._file.close()
