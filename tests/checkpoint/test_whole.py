"""The offline merge: a checkpoint appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.checkpoint import files, merge, merge_checkpoint
from fusedmerge.checkpoint.stream import StreamWriter
from tests.checkpoint.material import (
    assert_tensors,
    files_of,
    partial_of,
    q0_adapter,
    shard_names,
    written,
)

KILLED = """
    import sys, time
    from fusedmerge.checkpoint import merge, names, stream
    write = stream.StreamWriter.write
    def slow(*arguments):
        time.sleep(0.02)
        write(*arguments)
    stream.StreamWriter.write = slow
    merge.describe = lambda *_: names.Rules()
    merge.merge_checkpoint(sys.argv[1], [(sys.argv[2], 0.7), (sys.argv[3], -0.4)], sys.argv[4], progress=False)
"""


def test_killed_run_leaves_nothing_that_loads_and_the_next_continues(sharded, adapters, mixture, tmp_path):
    out = tmp_path / "out"
    root = str(Path(fm.__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), sharded, adapters["math"], adapters["code"], out]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    deadline = time.monotonic() + 60
    while not (partial_of(out) / shards[1]).exists() or not list(partial_of(out).glob("*.safetensors.tmp")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert not out.exists()
    left = {path.name: path.stat() for path in partial_of(out).iterdir()}
    finished = [name for name in shards if name in left]
    assert 2 <= len(finished) < len(shards)
    for name in finished:
        load_file(partial_of(out) / name)
    with pytest.raises(Exception, match=r"config|model_type|Unrecognized"):
        transformers.AutoModelForCausalLM.from_pretrained(partial_of(out))

    merge_checkpoint(sharded, mixture, out, progress=False)
    for name in shards:
        assert (out / name).stat().st_ino == left[name].st_ino if name in left else True, name
    assert not partial_of(out).exists()
    merge_checkpoint(sharded, mixture, tmp_path / "whole", progress=False)
    assert files_of(out) == files_of(tmp_path / "whole")


class Stop(Exception):
    pass


def stop_at(monkeypatch, shard, error=None):
    """Make the merge fail in the middle of the given shard."""
    write = StreamWriter.write

    def failing(self, data):
        if self._path.name == shard and self._left < 8000:
            raise error or Stop
        write(self, data)

    monkeypatch.setattr(StreamWriter, "write", failing)


def test_full_disk_keeps_what_is_finished(sharded, mixture, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shards = shard_names(sharded)
    with monkeypatch.context() as patched:
        stop_at(patched, shards[2], OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(errors.StateError, match=r"finished shards are kept.*No space left"):
            merge_checkpoint(sharded, mixture, out, progress=False)
    assert not out.exists() and shard_names(partial_of(out)) == shards[:2]
    names = written(monkeypatch)
    merge_checkpoint(sharded, mixture, out, progress=False)
    assert names == shards[2:]
    assert_tensors(sharded, out, mixture)


def change(what, sharded, mixture, tmp_path):
    """(base, adapters, keywords) of a recipe that differs."""
    if what == "gate":
        return sharded, [(mixture[0][0], 0.71), mixture[1]], {}
    if what == "dtype":
        return sharded, mixture, {"dtype": "float16"}
    if what == "order":
        return sharded, mixture[::-1], {}
    if what == "adapter":
        copy = shutil.copytree(mixture[0][0], tmp_path / "math")
        tensors = load_file(copy / "adapter_model.safetensors")
        tensors[min(tensors)] *= 1.5
        save_file(tensors, copy / "adapter_model.safetensors")
        return sharded, [(copy, 0.7), mixture[1]], {}
    copy = shutil.copytree(sharded, tmp_path / "base")
    path = copy / shard_names(copy)[0]
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    return copy, mixture, {}


@pytest.mark.parametrize("what", ["gate", "dtype", "adapter", "base", "order"])
def test_another_recipe_begins_anew(sharded, mixture, tmp_path, monkeypatch, what):
    out, shards = tmp_path / "out", shard_names(sharded)
    with monkeypatch.context() as patched:
        stop_at(patched, shards[-1])
        with pytest.raises(Stop):
            merge_checkpoint(sharded, mixture, out, progress=False)
    (partial_of(out) / "stray").mkdir()
    base, members, keywords = change(what, sharded, mixture, tmp_path)
    names = written(monkeypatch)
    merge_checkpoint(base, members, out, progress=False, **keywords)
    assert names == shards
    assert not (out / "stray").exists()
    assert_tensors(base, out, members, dtype=torch.float16 if what == "dtype" else None)


def test_the_same_adapters_from_another_place_continue(sharded, mixture, tmp_path, monkeypatch):
    out, shards = tmp_path / "out", shard_names(sharded)
    with monkeypatch.context() as patched:
        stop_at(patched, shards[1])
        with pytest.raises(Stop):
            merge_checkpoint(sharded, mixture, out, progress=False)
    moved = shutil.copytree(mixture[0][0], tmp_path / "elsewhere/math")
    names = written(monkeypatch)
    merge_checkpoint(sharded, [(moved, 0.7), mixture[1]], out, progress=False)
    assert names == shards[1:]


def test_damaged_partial_begins_anew(sharded, mixture, tmp_path):
    out = tmp_path / "out"
    partial_of(out).mkdir()
    (partial_of(out) / "manifest.json").write_text("{")
    (partial_of(out) / shard_names(sharded)[0]).write_bytes(b"rubbish")
    merge_checkpoint(sharded, mixture, out, progress=False)
    assert_tensors(sharded, out, mixture)


def test_two_runs_do_not_write_one_directory(llama, tmp_path, monkeypatch):
    adapter = q0_adapter(tmp_path / "a")
    work = merge._write_shard

    def meanwhile(*arguments):
        with pytest.raises(errors.StateError, match="no other run that writes it"):
            merge_checkpoint(llama, [(adapter, 2)], tmp_path / "out", progress=False)
        work(*arguments)

    monkeypatch.setattr(merge, "_write_shard", meanwhile)
    merge_checkpoint(llama, [(adapter, 1)], tmp_path / "out", progress=False)
    assert_tensors(llama, tmp_path / "out", [(adapter, 1)])


def test_overwrite_replaces_only_checkpoints_and_only_when_asked(llama, tmp_path, monkeypatch):
    adapter, out = q0_adapter(tmp_path / "a"), tmp_path / "out"
    merge_checkpoint(llama, [(adapter, 1)], out, progress=False)
    before = files_of(out)
    with pytest.raises(errors.InvalidValueError, match=r"a new directory \(or overwrite\)"):
        merge_checkpoint(llama, [(adapter, 2)], out, progress=False)
    with monkeypatch.context() as patched:
        stop_at(patched, "model.safetensors")
        with pytest.raises(Stop):
            merge_checkpoint(llama, [(adapter, 2)], out, overwrite=True, progress=False)
    assert files_of(out) == before
    (out / "old").write_text("")
    merge_checkpoint(llama, [(adapter, 2)], out, overwrite=True, progress=False)
    assert not (out / "old").exists()
    assert_tensors(llama, out, [(adapter, 2)])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for place in (home, tmp_path / "file"):
        with pytest.raises(errors.InvalidValueError, match="a checkpoint, or an empty directory"):
            merge_checkpoint(llama, [(adapter, 2)], place, overwrite=True, progress=False)
    assert (home / "thesis.tex").exists()


@pytest.mark.parametrize("new_is_there", [True, False])
def test_run_killed_between_the_two_renames_is_finished(llama, tmp_path, new_is_there):
    adapter, out = q0_adapter(tmp_path / "a"), tmp_path / "out"
    merge_checkpoint(llama, [(adapter, 1)], out, progress=False)
    aside = files._aside(out)
    if new_is_there:
        shutil.copytree(out, aside)
    else:
        out.rename(aside)
    with pytest.raises(errors.InvalidValueError, match="which exists"):
        merge_checkpoint(llama, [(adapter, 1)], out, progress=False)
    assert not aside.exists()
    assert_tensors(llama, out, [(adapter, 1)])


def test_destinations_that_would_destroy_the_inputs(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "all/base")
    adapter = q0_adapter(tmp_path / "all/a")
    shutil.copy(base / "config.json", tmp_path / "all/config.json")
    (tmp_path / "link").symlink_to(base)
    for out in (base, base / "out", tmp_path / "all", adapter, tmp_path / "link", tmp_path / "all/../all/base"):
        with pytest.raises(errors.InvalidValueError, match="out: expected a directory"):
            merge_checkpoint(base, [(adapter, 1)], out, overwrite=True, progress=False)
    assert files_of(base) == files_of(llama)


def test_destination_that_cannot_be_written(llama, tmp_path, monkeypatch):
    adapter = q0_adapter(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StateError, match="files that can be read and written"):
        merge_checkpoint(llama, [(adapter, 1)], tmp_path / "file/out", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(errors.StateError, match="MiB of free space"):
        merge_checkpoint(llama, [(adapter, 1)], tmp_path / "new/out", progress=False)
    monkeypatch.undo()
    merge_checkpoint(llama, [(adapter, 1)], tmp_path / "new/out", progress=False)
