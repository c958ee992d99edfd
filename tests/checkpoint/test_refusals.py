"""The offline merge: damaged checkpoints and bad arguments."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedmerge import errors
from fusedmerge.checkpoint import merge_checkpoint, parse_adapter_argument
from fusedmerge.checkpoint.stream import StreamWriter, read_header
from tests.checkpoint.material import (
    partial_of,
    q0_adapter,
    shard_names,
    write_adapter,
)


def damage(what, base):
    """Break a sharded checkpoint; returns what the error must say."""
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = shard_names(base)[0]
    inside = next(iter(load_file(base / first)))
    if what == "missing shard":
        (base / first).unlink()
        return errors.MissingFileError, f"the shard {first}"
    if what == "cut short":
        with (base / first).open("r+b") as file:
            file.truncate(file.seek(0, 2) - 1)
        return errors.FormatError, "was the file cut short"
    if what == "wrong magic":
        (base / first).write_bytes(b"PK\x03\x04 not at all safetensors")
        return errors.FormatError, "a safetensors file"
    if what == "pointer":
        (base / first).write_bytes(b"v1")
        return errors.FormatError, "a safetensors file"
    if what == "bad header":
        (base / first).write_bytes(struct.pack("<Q", 5) + b"{oops")
        return errors.FormatError, "a safetensors header"
    if what == "index names more":
        content["weight_map"]["model.layers.9.self_attn.q_proj.weight"] = first
        index.write_text(json.dumps(content))
        return errors.FormatError, "got it in no shard"
    if what == "index names another shard":
        content["weight_map"][inside] = shard_names(base)[1]
        index.write_text(json.dumps(content))
        return errors.FormatError, f"got it in {first}"
    if what == "twice":
        second = base / shard_names(base)[1]
        save_file({**load_file(second), inside: load_file(base / first)[inside]}, second)
        return errors.FormatError, "each tensor in one shard"
    if what == "outside":
        content["weight_map"][inside] = "../base/" + first
        index.write_text(json.dumps(content))
        return errors.FormatError, "beside the index"
    if what == "empty index":
        index.write_text("{}")
        return errors.FormatError, "weight_map"
    if what == "broken index":
        index.write_text("{")
        return errors.FormatError, "valid JSON"
    if what == "no config":
        (base / "config.json").unlink()
        return errors.MissingFileError, "config.json"
    if what == "broken config":
        (base / "config.json").write_text("[]")
        return errors.FormatError, "a JSON object"
    if what == "adapter inside":
        (base / "adapter_config.json").write_text("{}")
        return errors.FormatError, "applied on top"
    for path in [*base.glob("*.safetensors"), index]:
        path.unlink()
    if what == "pickled":
        (base / "pytorch_model.bin").write_bytes(b"")
        return errors.FormatError, "convert it"
    return errors.MissingFileError, "model.safetensors or model.safetensors.index.json"


@pytest.mark.parametrize("what", [
    "missing shard", "cut short", "wrong magic", "pointer", "bad header", "index names more", "index names another shard", "twice",
    "outside", "empty index", "broken index", "no config", "broken config", "adapter inside", "pickled", "empty",
])  # fmt: skip
def test_damaged_bases(sharded, mixture, tmp_path, what):
    base = shutil.copytree(sharded, tmp_path / "base")
    kind, message = damage(what, base)
    with pytest.raises(kind) as caught:
        merge_checkpoint(base, mixture, tmp_path / "out", progress=False)
    assert message in str(caught.value) and str(caught.value).startswith("merge: ")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_headers_that_lie(tmp_path):
    def header(fields, data=b"\0" * 16):
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
        return tmp_path / "x"

    entry = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
    good = {"a": entry, "b": {**entry, "data_offsets": [8, 16]}}
    assert list(read_header(header(good), "merge").entries) == ["a", "b"]
    wrong = {
        "gap": {"a": entry, "b": {**entry, "data_offsets": [12, 16], "shape": [1]}},
        "overlap": {"a": entry, "b": {**entry, "data_offsets": [4, 12]}},
        "size": {"a": {**entry, "shape": [3, 1]}, "b": good["b"]},
        "negative": {"a": {**entry, "shape": [-2, -1]}, "b": good["b"]},
        "reversed": {"a": {**entry, "data_offsets": [8, 0]}},
        "field": {"a": {"dtype": "F32"}},
        "list": [1, 2],
        "twin": json.dumps({"c": entry, **good}).replace('"c"', '"a"'),
    }
    for label, fields in wrong.items():
        with pytest.raises(errors.FormatError):
            read_header(header(fields), "merge")
            pytest.fail(label)


def test_single_file_is_preferred_to_an_index_and_diffusers_names_work(llama, sharded, tmp_path):
    adapter = q0_adapter(tmp_path / "a")
    both = shutil.copytree(sharded, tmp_path / "both")
    shutil.copy(llama / "model.safetensors", both)
    merge_checkpoint(both, [(adapter, 1)], tmp_path / "out", progress=False)
    assert shard_names(tmp_path / "out") == ["model.safetensors"]
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    diffusers = shutil.copytree(llama, tmp_path / "diffusers")
    (diffusers / "model.safetensors").rename(diffusers / "diffusion_pytorch_model.safetensors")
    (diffusers / "config.json").write_text('{"_class_name": "Transformer"}')
    merge_checkpoint(diffusers, [(adapter, 1)], tmp_path / "out2", progress=False)
    assert shard_names(tmp_path / "out2") == ["diffusion_pytorch_model.safetensors"]


def test_arguments(llama, tmp_path):
    a, b = q0_adapter(tmp_path / "x/a"), q0_adapter(tmp_path / "y/a", seed=1)
    odd = write_adapter(tmp_path / "odd", {"model.layers.0.self_attn.q_proj": (48, 40)})
    vector = write_adapter(tmp_path / "vector", {"model.norm": (48, 48)})
    nan = q0_adapter(tmp_path / "nan")
    tensors = load_file(nan / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, nan / "adapter_model.safetensors")
    wide = q0_adapter(tmp_path / "wide")
    factors = {name: tensor.double() * 1e300 for name, tensor in load_file(wide / "adapter_model.safetensors").items()}
    save_file(factors, wide / "adapter_model.safetensors")
    cases = [
        ([], {}, errors.InvalidValueError, "at least one"),
        (str(a), {}, errors.InvalidTypeError, "a sequence of"),
        ([a], {}, errors.InvalidTypeError, "pairs"),
        ([(a, float("nan"))], {}, errors.InvalidValueError, "gate of a: expected a finite float32"),
        ([(a, float("inf"))], {}, errors.InvalidValueError, "gate of a: expected a finite float32"),
        ([(a, 1e39)], {}, errors.InvalidValueError, "gate of a: expected a finite float32"),
        ([(a, 3e38)], {}, errors.FormatError, "gate \\* scaling"),
        ([(a, "1")], {}, errors.InvalidTypeError, "a number"),
        ([(a, True)], {}, errors.InvalidTypeError, "a number"),
        ([(a, 1), (b, 1)], {}, errors.InvalidValueError, "different names"),
        ([(odd, 1)], {}, errors.ShapeError, r"shape \[48, 48\], got \[48, 40\]"),
        ([(vector, 1)], {}, errors.ShapeError, r"shape \[48\]"),
        ([(nan, 1)], {}, errors.FormatError, "finite"),
        ([(wide, 1)], {}, errors.FormatError, "finite in float32"),
        ([(tmp_path / "nowhere", 1)], {}, errors.MissingFileError, "nowhere"),
        ([(a, 1)], {"dtype": "int8"}, errors.DtypeError, "bfloat16, float16, float32 or None"),
        ([(a, 1)], {"dtype": torch.float64}, errors.DtypeError, "bfloat16"),
        ([(a, 1)], {"device": "gpu"}, errors.DeviceError, "a device that torch can use"),
        ([(a, 1)], {"device": "meta"}, errors.DeviceError, "a device that computes"),
    ]
    for adapters, keywords, kind, message in cases:
        with pytest.raises(kind, match=message):
            merge_checkpoint(llama, adapters, tmp_path / "out", progress=False, **keywords)
        assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()
    with pytest.raises(errors.MissingFileError, match="a checkpoint directory"):
        merge_checkpoint(tmp_path / "nowhere", [(a, 1)], tmp_path / "out", progress=False)


@pytest.mark.parametrize(("argument", "expected"), [
    ("runs/math", ("runs/math", 1.0)), ("runs/math:0.7", ("runs/math", 0.7)), ("a:b:-2", ("a:b", -2.0)), ("C:/math", ("C:/math", 1.0)),
    ("run:3:1", ("run:3", 1.0)), ("math:", ("math:", 1.0)), ("math:nan", ("math:nan", 1.0)), ("math:inf", ("math:inf", 1.0)),
    ("math:1e999", ("math:1e999", 1.0)), ("math:1e-1", ("math", 0.1)), ("math:.5", ("math", 0.5)), ("math:1_0", ("math:1_0", 1.0)),
    ("math:+2.", ("math", 2.0)), ("math: 2", ("math: 2", 1.0)),
])  # fmt: skip
def test_adapter_arguments(argument, expected):
    assert parse_adapter_argument(argument) == expected


@pytest.mark.parametrize("argument", ["", ":0.5"])
def test_adapter_argument_without_a_directory(argument):
    with pytest.raises(errors.InvalidValueError, match="DIR or DIR:GATE"):
        parse_adapter_argument(argument)


def test_writer_is_readable_by_safetensors_and_aligned(tmp_path):
    layouts = [(('é"x', "F64", (1,)), 8), (("b", "F32", (2, 3)), 24), (("empty", "F32", (0, 2)), 0), (("c", "BF16", ()), 2)]
    payload = bytes(range(34))
    with StreamWriter(tmp_path / "x", layouts, {"format": "pt"}) as writer:
        assert not (tmp_path / "x").exists()
        for start in range(0, 34, 5):
            writer.write(memoryview(payload[start : start + 5]))
    tensors = load_file(tmp_path / "x")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {'é"x': (1,), "b": (2, 3), "empty": (0, 2), "c": ()}
    assert b"".join(tensors[name].view(-1).view(torch.uint8).numpy().tobytes() for (name, _, _), _ in layouts) == payload
    assert read_header(tmp_path / "x", "merge").data % 8 == 0
    with pytest.raises(AssertionError, match="were not written"), StreamWriter(tmp_path / "y", layouts, {}):
        pass
    assert not (tmp_path / "y").exists()


def test_an_adapter_with_parts_missing_is_refused(llama, tmp_path):
    adapter = q0_adapter(tmp_path / "a", target_modules=["q_proj", "v_proj"])
    with pytest.raises(errors.FormatError, match=r"target_modules: expected factors for the entry 'v_proj'"):
        merge_checkpoint(llama, [(adapter, 1.0)], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_overwrite_spares_whatever_is_no_checkpoint(llama, adapters, tmp_path):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src" / "precious.py").write_text("")
    with pytest.raises(errors.InvalidValueError, match="which is neither"):
        merge_checkpoint(llama, [(adapters["math"], 1.0)], project, overwrite=True, progress=False)
    assert (project / "src" / "precious.py").exists()
