"""Checkpoint directories: what one must hold to be merged into, and how a new one appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.checkpoint.stream import Entry, Header, Layout, read_header
from fusedmerge.checks import read_json
from fusedmerge.errors import FormatError, InvalidValueError, MissingFileError, StateError

if TYPE_CHECKING:
    from typing import Self

__all__ = ["RECORD", "Base", "Partial", "check_destination", "open_base", "os_errors"]

RECORD = "fusedmerge.json"  # what a merged checkpoint was made of
_OP = "merge"
_STEMS = ("model", "diffusion_pytorch_model")  # transformers, diffusers
CARRIED_DIRECTORIES = ("additional_chat_templates",)  # of a tokenizer; others (other formats' weights, say) are left out
_MANIFEST = "manifest.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".index.json", ".tmp")


# ---------------------------------------------------------------------- the base


@dataclass(frozen=True)
class Base:
    """A checkpoint that can be merged into."""

    directory: Path
    config: dict[str, Any]
    shards: dict[str, Header]  # by file name
    index: str | None  # the index file's name, where there is one
    index_metadata: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Entry]:
        """All tensors by their names in the files."""
        return {name: entry for header in self.shards.values() for name, entry in header.entries.items()}

    def identity(self) -> list[list[Any]]:
        """What tells that the weight files are still the same ones: name, size and time of change of each."""
        stats = {name: header.path.stat() for name, header in self.shards.items()}
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]

    def carried(self) -> list[Path]:
        """The files that a merge copies: everything at the top level that is neither weights nor written anew."""
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        return [path for path in files if not path.name.endswith(_WEIGHTS) and path.name not in ("config.json", RECORD, _MANIFEST)]


def open_base(directory: str | os.PathLike[str], operation: str = _OP) -> Base:
    """Read the headers of a Hugging Face checkpoint. Raises MissingFileError, or FormatError for one that cannot be merged into."""
    path = Path(directory)
    if not path.is_dir():
        raise MissingFileError(operation, "base", "a checkpoint directory on this machine", f"{str(path)!r}, which is not one")
    if (path / "adapter_config.json").is_file():
        raise FormatError(
            operation, str(path), "a whole checkpoint", "one with an adapter (adapter_config.json), which would be applied on top"
        )
    config = read_json(path / "config.json", operation)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("quantization_config") or part.get("compression_config"):
            expected = "a plain checkpoint (merge into the unquantised base)"
            raise FormatError(operation, f"{path}: config.json", expected, "one with a quantization_config")
    for stem in _STEMS:  # in transformers' own order: a single file is preferred to an index
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if (path / single).is_file():
            return Base(path, config, {single: read_header(path / single, operation)}, None, {})
        if (path / index).is_file():
            return _open_sharded(path, config, index, operation)
    if any(path.glob("*.bin")):
        expected = "safetensors (convert it: from_pretrained, then save_pretrained)"
        raise FormatError(operation, str(path), expected, "a checkpoint of pickled .bin files")
    raise MissingFileError(operation, str(path), "model.safetensors or model.safetensors.index.json", "neither")


def _open_sharded(path: Path, config: dict[str, Any], index: str, operation: str) -> Base:
    content = read_json(path / index, operation)
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(operation, str(path / index), "a weight_map of tensor name to file", repr(weight_map)[:80])
    shards: dict[str, Header] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(operation, str(path / index), "safetensors files beside the index", repr(name))
        if not (path / name).is_file():
            raise MissingFileError(operation, str(path / index), f"the shard {name}", "no such file")
        shards[name] = read_header(path / name, operation)
    owner: dict[str, str] = {}
    for name, header in shards.items():
        for tensor in header.entries:
            if tensor in owner:
                raise FormatError(operation, f"{path}: {tensor}", "each tensor in one shard", f"it in {owner[tensor]} and {name}")
            owner[tensor] = name
    for tensor, name in weight_map.items():
        if owner.get(tensor) != name:
            raise FormatError(operation, f"{path / index}: {tensor}", f"a tensor in {name}", f"it in {owner.get(tensor, 'no shard')}")
    return Base(path, config, shards, index, metadata)


# ---------------------------------------------------------------------- the destination


def check_destination(out: str | os.PathLike[str], base: Path, adapters: list[Path], overwrite: bool) -> Path:
    """The resolved destination. Raises InvalidValueError where writing it would destroy something that is not an older merge."""
    path = Path(out).resolve()
    source = base.resolve()
    if path == source or source in path.parents:
        raise InvalidValueError(_OP, "out", "a directory outside the base", str(path))
    for kept in (source, *(adapter.resolve() for adapter in adapters)):
        if path == kept or path in kept.parents:
            raise InvalidValueError(_OP, "out", "a directory that holds neither the base nor an adapter", f"{path}, which holds {kept}")
    _recover(path)
    if path.exists():
        if not overwrite:
            raise InvalidValueError(_OP, "out", "a new directory (or overwrite)", f"{path}, which exists")
        if not _replaceable(path):
            raise InvalidValueError(_OP, "out", "a checkpoint, or an empty directory, to overwrite", f"{path}, which is neither")
    return path


def _replaceable(path: Path) -> bool:
    """An empty directory, an older merge, or files of a checkpoint and nothing below them."""
    if not path.is_dir():
        return False
    inside = list(path.iterdir())
    weights = any(entry.suffix == ".safetensors" for entry in inside)
    flat = not any(entry.is_dir() and entry.name not in CARRIED_DIRECTORIES for entry in inside)
    return not inside or ((path / "config.json").is_file() and weights and flat) or (path / RECORD).is_file()


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _recover(out: Path) -> None:
    """Finish what a run that was killed while it replaced `out` left undone."""
    aside = _aside(out)
    if aside.is_dir() and _replaceable(aside):
        with os_errors(str(aside)):
            if out.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(out)


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Say what could not be written, and that finished shards are kept."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise StateError(_OP, what, "files that can be read and written (finished shards are kept for the next run)", error) from error


class Partial:
    """The hidden directory beside `out` in which a merge grows, shard by shard; it becomes `out` by one rename.

    It holds no config.json until everything else is there, so it does not load. A second run of the same recipe continues in it;
    another recipe begins anew. A lock keeps two runs apart, and ends with its process, however that ends.
    """

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.partial")
        recipe = json.loads(json.dumps(recipe))
        with os_errors(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            try:
                self._take()
                if self._manifest() != recipe:
                    self._empty()
                    write_json(self.path / _MANIFEST, recipe)
            except BaseException:
                os.close(self._lock)
                raise

    def _take(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(_OP, str(self.out), "no other run that writes it", f"one at work in {self.path.name}") from None
        except OSError:
            pass  # a filesystem without locks

    def _manifest(self) -> object:
        try:
            return json.loads((self.path / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            return None

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def finished(self, shard: str) -> int:
        """Bytes of a shard that an earlier run finished; 0 if it is still to be written."""
        path = self.path / shard
        return path.stat().st_size if path.is_file() else 0

    def require_space(self, nbytes: int) -> None:
        """Raise StateError where the filesystem has not that much room."""
        free = shutil.disk_usage(self.path).free
        if nbytes > free:
            raise StateError(_OP, str(self.out), f"{nbytes / 2**20:,.0f} MiB of free space", f"{free / 2**20:,.0f} MiB")

    def carry_over(self, base: Base, shards: Mapping[str, Sequence[Layout]], record: Mapping[str, Any]) -> None:
        """Everything but the weights and the configuration: the base's other files, the index, and the record of the mixture."""
        for path in base.carried():
            shutil.copy2(path, self.path / path.name)
        for name in CARRIED_DIRECTORIES:
            if (base.directory / name).is_dir():
                shutil.copytree(base.directory / name, self.path / name, dirs_exist_ok=True)
        write_json(self.path / RECORD, record)
        if base.index is not None:
            weight_map = {name: shard for shard, layouts in shards.items() for name, _, _ in layouts}
            total = sum((self.path / shard).stat().st_size - read_header(self.path / shard, _OP).data for shard in shards)
            metadata = {**base.index_metadata, "total_size": total}
            write_json(self.path / base.index, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})

    def publish(self, config: bytes) -> None:
        """Write the configuration, last of all, and move the directory to its place. An older `out` is replaced."""
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        (self.path / _MANIFEST).unlink()
        _write_bytes(self.path / "config.json", config)
        os.fsync(self._lock)
        aside = _aside(self.out)
        if self.out.exists():
            self.out.rename(aside)
            try:
                self.path.rename(self.out)
            except OSError:
                aside.rename(self.out)
                raise
            shutil.rmtree(aside)
        else:
            self.path.rename(self.out)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file: the old one or the whole new one is there, never a part."""
    _write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """JSON as these files hold it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_bytes(path: Path, content: bytes) -> None:
    tmp = path.with_name(path.name + ".tmp")
    with tmp.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
