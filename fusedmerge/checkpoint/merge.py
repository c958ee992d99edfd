"""The offline merge: a mixture of adapters into a Hugging Face checkpoint, tensor by tensor.

out = round(base + sum_e gate_e scaling_e B_e A_e), with the factors in float32 and one rounding. Blocks of rows are read, merged as a
switch on the CPU merges them, and appended to the output: the memory needed is the adapters' and a few MiB, whatever the checkpoint's
size. All checks come before the first byte is written.

    base's headers ---+                               +-- untouched: bytes copied -------+
    adapters ---------+-- plan {tensor: experts} -----+                                  +-- shard in .out.partial -- rename to out
    names in memory --+                               +-- adapted: blocks of rows -------+
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fusedmerge import __version__
from fusedmerge.backend import Adder, make_adder
from fusedmerge.backend.cpu import BLOCK_ELEMENTS, Expert, exact_products, row_blocks
from fusedmerge.checkpoint.files import Base, Partial, check_destination, json_bytes, open_base, os_errors
from fusedmerge.checkpoint.names import Match, NameMap, describe
from fusedmerge.checkpoint.stream import Entry, Header, Layout, StreamWriter, itemsize, read_chunks, read_into, torch_dtype
from fusedmerge.checks import usable_device
from fusedmerge.errors import DtypeError, FormatError, InvalidTypeError, InvalidValueError
from fusedmerge.formats.lora import Adapter
from fusedmerge.staging import check_complete

if TYPE_CHECKING:
    import torch

__all__ = ["merge_checkpoint", "parse_adapter_argument"]

logger = logging.getLogger(__name__)

_OP = "merge"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_GATE = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def parse_adapter_argument(argument: str) -> tuple[str, float]:
    """ "dir" or "dir:gate" as (directory, gate): split at the last colon only if a finite number follows, else the gate is 1.

    >>> parse_adapter_argument("runs/math:0.7"), parse_adapter_argument("C:/math")
    (('runs/math', 0.7), ('C:/math', 1.0))
    """
    directory, colon, gate = argument.rpartition(":")
    if not colon or not _GATE.fullmatch(gate) or not math.isfinite(float(gate)):
        directory, gate = argument, "1"
    if not directory:
        raise InvalidValueError(_OP, "adapter", "DIR or DIR:GATE", repr(argument))
    return directory, float(gate)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write `base` with the adapters merged in to the directory `out`, as a checkpoint of the same layout.

    adapters: (PEFT directory, gate) each; the same directory twice adds its gates. dtype: None keeps each tensor's own; bfloat16, float16
    or float32 converts every floating tensor. device: where the products are computed. progress: a bar on stderr.

    The directory appears by one rename. A run that is stopped leaves a hidden `.<out>.partial`, and the same call continues there.
    Raises MissingFileError, FormatError (damaged, quantised or unsupported files), UnknownNameError (targets without a tensor), ShapeError,
    StateError (tied targets, no space, another run at work), InvalidValueError, DtypeError and DeviceError: all but a full disk, an
    overflow and a file that changes meanwhile before anything is written.
    """
    target_dtype = _check_dtype(dtype)
    where = usable_device(device, _OP)
    source = open_base(base)
    gates = _check_gates(adapters)
    destination = check_destination(out, source.directory, list(gates), overwrite)
    members = _read_members(gates)
    jobs = _plan(source, members)
    shards = {name: _layouts(header, target_dtype) for name, header in source.shards.items()}
    record = {
        "fusedmerge_version": __version__, "operation": _OP, "base": source.directory.resolve().name, "dtype": target_dtype,
        "adapters": [member.record() for member in members],
    }  # fmt: skip
    recipe = {"files": source.identity(), "device": where.type, **record}
    with Partial(destination, recipe) as partial, os_errors(str(destination)), exact_products():
        left = {name: layouts for name, layouts in shards.items() if not partial.finished(name)}
        partial.require_space(sum(nbytes for layouts in left.values() for _, nbytes in layouts))
        with _progress(shards, left, progress) as report:
            for name, layouts in left.items():
                header = source.shards[name]
                metadata = {"format": "pt", **header.metadata, "fusedmerge": json.dumps(record)}
                _write_shard(header, layouts, jobs, partial.path / name, metadata, where, report)
        partial.carry_over(source, {name: [layout for layout, _ in layouts] for name, layouts in shards.items()}, record)
        partial.publish(_config(source, target_dtype))


# ---------------------------------------------------------------------- arguments


def _check_dtype(dtype: torch.dtype | str | None) -> str | None:
    """The dtype's name."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise DtypeError(_OP, "dtype", f"{', '.join(_DTYPES)} or None", dtype)
    return name


def _check_gates(adapters: Sequence[tuple[str | os.PathLike[str], float]]) -> dict[Path, float]:
    """{adapter directory: gate}, in the order given, with the gates of one directory added."""
    if isinstance(adapters, (str, bytes, os.PathLike)) or not isinstance(adapters, Sequence):
        raise InvalidTypeError(_OP, "adapters", "a sequence of (directory, gate)", type(adapters).__name__)
    if not adapters:
        raise InvalidValueError(_OP, "adapters", "at least one", "none")
    gates: dict[Path, float] = {}
    names: dict[str, Path] = {}
    for pair in adapters:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], (str, os.PathLike)):
            raise InvalidTypeError(_OP, "adapters", "pairs (directory, gate)", repr(pair))
        if isinstance(pair[1], bool) or not isinstance(pair[1], (int, float)):
            raise InvalidTypeError(_OP, f"gate of {pair[0]}", "a number", repr(pair[1]))
        path = Path(os.path.abspath(pair[0]))
        same = next((known for known in gates if known.resolve() == path.resolve()), path)
        gates[same] = gates.get(same, 0.0) + float(pair[1])
        other = names.setdefault(same.name, same)
        if other != same:
            raise InvalidValueError(_OP, "adapters", "directories of different names (link one)", f"{other} and {same}")
    for path, gate in gates.items():
        if not abs(gate) <= 3.4e38:  # the range of float32; nan fails too
            raise InvalidValueError(_OP, f"gate of {path.name}", "a finite float32", gate)
    return gates


# ---------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Member:
    """An adapter of the mixture."""

    adapter: Adapter
    gate: float
    sha256: dict[str, str]

    def record(self) -> dict[str, Any]:
        scalings = {target: factors.scaling for target, factors in self.adapter.targets.items()}
        values = set(scalings.values())
        scaling = values.pop() if len(values) == 1 else scalings
        return {"name": self.adapter.name, "gate": self.gate, "scaling": scaling, "targets": len(scalings), "sha256": self.sha256}


def _read_members(gates: Mapping[Path, float]) -> list[_Member]:
    from fusedmerge.formats.peft import read_peft

    members = []
    for path, gate in gates.items():
        adapter = read_peft(path, path.name)
        files = sorted(file for file in path.iterdir() if file.name.startswith("adapter_") and file.is_file())
        members.append(_Member(adapter, gate, {file.name: _sha256(file) for file in files}))
    return members


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plan(base: Base, members: Sequence[_Member]) -> dict[str, list[Expert]]:
    """{tensor's name in the files: the experts on it}. Raises whatever makes the mixture impossible."""
    tensors = base.tensors
    names = NameMap(tensors, base.config, describe(base.directory, base.config, list(tensors)))
    jobs: dict[str, list[Expert]] = {}
    for member in members:
        adapter = member.adapter
        check_complete(adapter, tensors, _OP)
        for target, match in names.find(adapter.targets, adapter.name, _OP).items():
            jobs.setdefault(match.disk, []).append(_expert(member, target, match, tensors[match.disk]))
        for name, carried in adapter.base_weights.items():
            disk = names.carried(name)
            if disk is None or not _same_bits(base, tensors[disk], carried):
                expected = "the bits of the checkpoint's own weight"
                got = "no such tensor" if disk is None else "another (the adapter's file changes the base)"
                raise FormatError(_OP, f'adapter "{adapter.name}": {name}', expected, got)
    return jobs


def _expert(member: _Member, target: str, match: Match, entry: Entry) -> Expert:
    import torch

    what = f'adapter "{member.adapter.name}" on {target}'
    if entry.dtype not in _DTYPES.values():
        raise DtypeError(_OP, what, "a bfloat16, float16 or float32 weight (merge into the unquantised base)", entry.dtype)
    factors = member.adapter.targets[target].oriented(entry.shape, match.transposed, _OP, what)  # type: ignore[arg-type]
    coefficient = member.gate * factors.scaling
    if not abs(coefficient) <= 3.4e38:
        raise FormatError(_OP, f"{what}: gate * scaling", "a finite float32", coefficient)
    for side, tensor in (("A", factors.a), ("B", factors.b)):
        if not bool(torch.isfinite(tensor.float()).all()):
            raise FormatError(_OP, f"{what}: {side}", "factors that are finite in float32", "inf or NaN")
    return Expert(factors.a, factors.b, coefficient)


def _same_bits(base: Base, entry: Entry, carried: torch.Tensor) -> bool:
    import torch

    if torch_dtype(entry.dtype) != carried.dtype or entry.shape != tuple(carried.shape):
        return False
    ours = carried.contiguous().view(-1).view(torch.uint8)
    with _owner(base, entry).path.open("rb", buffering=0) as file:
        done = 0
        for block in read_chunks(file, entry, _OP):
            if not torch.equal(ours[done : done + len(block)], torch.frombuffer(block, dtype=torch.uint8)):
                return False
            done += len(block)
    return True


def _owner(base: Base, entry: Entry) -> Header:
    return next(header for header in base.shards.values() if header.entries.get(entry.name) is entry)


def _layouts(header: Header, dtype: str | None) -> list[tuple[Layout, int]]:
    """The output's tensors in the order of their bytes, and their sizes. The widest come first, so that all are aligned."""
    layouts = []
    for entry in header.entries.values():
        if dtype is not None and torch_dtype(entry.dtype) is not None:
            code = _DTYPES[dtype]
            layouts.append(((entry.name, code, entry.shape), math.prod(entry.shape) * itemsize(code)))
        else:
            layouts.append(((entry.name, entry.dtype, entry.shape), entry.nbytes))
    return sorted(layouts, key=lambda pair: -itemsize(pair[0][1]))


# ---------------------------------------------------------------------- the work


def _write_shard(
    header: Header,
    layouts: Sequence[tuple[Layout, int]],
    jobs: Mapping[str, list[Expert]],
    path: Path,
    metadata: Mapping[str, str],
    device: torch.device,
    report: Callable[[int], object],
) -> None:
    with header.path.open("rb", buffering=0) as source, StreamWriter(path, layouts, metadata) as sink:
        for (name, code, _), _ in layouts:
            entry = header.entries[name]
            add = make_adder(jobs.get(name, ()), device)
            same = add is None and code == entry.dtype
            for block in read_chunks(source, entry, _OP) if same else _merged(source, entry, add, code, device):
                sink.write(block)
                report(block.nbytes)


def _merged(file: BinaryIO, entry: Entry, add: Adder | None, code: str, device: torch.device) -> Iterator[memoryview]:
    """A tensor's bytes with the experts added, or only converted. Raises FormatError where a finite weight becomes infinite."""
    import torch

    given, wanted = torch_dtype(entry.dtype), torch_dtype(code)
    assert given is not None and wanted is not None  # the plan saw to it
    rows, cols = entry.shape if add else (math.prod(entry.shape), 1)
    width = itemsize(entry.dtype)
    most = max(cols, min(rows * cols, BLOCK_ELEMENTS))
    buffer = bytearray(most * width)
    for block in row_blocks(rows, cols):
        count = block.stop - block.start
        size = count * cols * width
        read_into(file, entry.start + block.start * cols * width, memoryview(buffer)[:size], _OP)
        source = torch.frombuffer(buffer, dtype=given, count=count * cols).view(count, cols).to(device)
        if add:
            wide = source.to(torch.float32, copy=True)
            add(wide, block)
            live = wide.to(wanted)
        else:
            live = source.to(wanted)
        extremes = torch.stack(torch.aminmax(live))  # NaN if there is any; twenty times faster than isfinite of every element
        if not bool(torch.isfinite(extremes).all()) and not torch.equal(torch.isfinite(live), torch.isfinite(source)):
            raise FormatError(_OP, entry.name, f"weights that are finite in {wanted}", "inf or NaN (too large for that dtype)")
        yield memoryview(live.cpu().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextlib.contextmanager
def _progress(shards: Mapping[str, Sequence[tuple[Layout, int]]], left: Container[str], show: bool) -> Iterator[Callable[[int], object]]:
    """A bar over the output's bytes; yields the function to report them to."""
    from tqdm import tqdm

    total = {name: sum(nbytes for _, nbytes in layouts) for name, layouts in shards.items()}
    done = sum(nbytes for name, nbytes in total.items() if name not in left)
    with tqdm(total=sum(total.values()), initial=done, unit="B", unit_scale=True, desc="merge", disable=not show) as bar:
        yield bar.update


def _config(base: Base, dtype: str | None) -> bytes:
    """The output's config.json: the base's own bytes, or with its dtype entries changed."""
    if dtype is None:
        return (base.directory / "config.json").read_bytes()

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: changed(inner, entry) for inner, entry in value.items()}
        return dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value

    return json_bytes(changed("", base.config))
