"""The offline merge: values, the record, and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.checkpoint import merge, merge_checkpoint, names
from fusedmerge.checkpoint.stream import StreamWriter, read_header
from tests.checkpoint.material import (
    Q0,
    SIZES,
    assert_same_logits,
    assert_tensors,
    build,
    files_of,
    partial_of,
    peft_adapters,
    peft_merged,
    q0_adapter,
    save,
    tensors_of,
    write_adapter,
)
from tests.kit import assert_merged, bits


def test_output_loads_and_its_logits_are_pefts(llama, adapters, mixture, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(llama, mixture, out, progress=False)
    assert_tensors(llama, out, mixture)
    expected = peft_merged(llama, transformers.AutoModelForCausalLM, adapters, {"math": 0.7, "code": -0.4})
    assert_same_logits(out, expected)
    assert not partial_of(out).exists()


def test_gpt2_stores_its_weights_transposed(tmp_path):
    """Conv1D is [in, out]; c_proj of the attention is square, so that its shape tells nothing. The tie of lm_head stays."""
    base = save(build("gpt2"), tmp_path / "base")
    config = {"r": 6, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    paths = peft_adapters(build("gpt2"), tmp_path / "adapters", {"one": config})
    merge_checkpoint(base, [(paths["one"], 0.9)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(paths["one"], 0.9)])
    assert_same_logits(tmp_path / "out", peft_merged(base, transformers.AutoModelForCausalLM, paths, {"one": 0.9}))


def test_square_weight_without_transformers_is_read_by_the_adapters_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "describe", lambda *_: names.Rules())
    base = save(build("gpt2"), tmp_path / "base")
    module = "transformer.h.0.attn.c_proj"
    for flag in (True, False):
        adapter = write_adapter(tmp_path / f"a{flag}", {module: (48, 48)}, fan_in_fan_out=flag)
        merge_checkpoint(base, [(adapter, 1)], tmp_path / f"out{flag}", progress=False)
        factors = load_file(adapter / "adapter_model.safetensors")
        delta = 1.5 * factors[f"base_model.model.{module}.lora_B.weight"] @ factors[f"base_model.model.{module}.lora_A.weight"]
        name = f"{module}.weight"
        got = tensors_of(tmp_path / f"out{flag}")[name] - tensors_of(base)[name]
        torch.testing.assert_close(got, delta.t() if flag else delta, rtol=1e-4, atol=1e-5)


def test_sharded_bfloat16_is_rounded_once_and_keeps_its_layout(sharded, mixture, tmp_path):
    out = tmp_path / "out"
    merge_checkpoint(sharded, mixture, out, progress=False)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_tensors(sharded, out, mixture)
    before, after = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (sharded, out))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    for name, content in files_of(sharded).items():
        if not name.endswith(".safetensors") and name != "model.safetensors.index.json":
            assert (out / name).read_bytes() == content, name
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_of_every_floating_tensor(llama, sharded, mixture, tmp_path, dtype):
    """From float32, and from bfloat16; the adapted tensors are not rounded to anything in between."""
    for index, base in enumerate((llama, sharded)):
        out = tmp_path / f"out{index}"
        merge_checkpoint(base, mixture, out, dtype=dtype, progress=False)
        assert_tensors(base, out, mixture, dtype=dtype)
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    total = json.loads((tmp_path / "out1/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out1").values())


def test_conversion_leaves_integers_and_updates_nested_configurations(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    others = {"ahead": torch.ones(1), "flags": torch.tensor([True, False, True]), "none": torch.zeros(0, 4)}
    tensors = {**tensors_of(llama), "steps": torch.arange(5, dtype=torch.int32), **others}
    save_file(tensors, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    config |= {"torch_dtype": "float32", "text_config": {"dtype": "float32", "name": "x"}}
    (base / "config.json").write_text(json.dumps(config))
    merge_checkpoint(base, [(q0_adapter(tmp_path / "a"), 1.0)], tmp_path / "out", dtype="bfloat16", progress=False)
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after["steps"], tensors["steps"]) and torch.equal(after["flags"], tensors["flags"])
    assert after["none"].shape == (0, 4) and after["none"].dtype == after["ahead"].dtype == torch.bfloat16
    for entry in read_header(tmp_path / "out/model.safetensors", "test").entries.values():
        assert entry.start % after[entry.name].itemsize == 0, entry  # also where a wider tensor before it became narrower
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        **config, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "name": "x"},
    }  # fmt: skip


def test_factors_keep_float32_and_float64_is_narrowed(sharded, tmp_path):
    """Adapters that 16-bit factors would misround by percents."""
    shapes = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.up_proj": (80, 48)}
    for dtype in (torch.float32, torch.float64, torch.float16):
        adapter = write_adapter(tmp_path / str(dtype), shapes, r=48, dtype=dtype)
        merge_checkpoint(sharded, [(adapter, 1.3)], tmp_path / f"out{dtype}", progress=False)
        assert_tensors(sharded, tmp_path / f"out{dtype}", [(adapter, 1.3)])


def one_weight(directory, weight):
    directory.mkdir()
    save_file({"w.weight": weight}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def test_same_bits_as_a_switch_with_float32_factors(tmp_path):
    """A weight of many row blocks: the blocks are the switch's own."""
    weight = torch.randn(700, 800, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    adapter = write_adapter(tmp_path / "a", {"w": (700, 800)}, r=16)
    merge_checkpoint(one_weight(tmp_path / "base", weight), [(adapter, 0.5)], tmp_path / "out", progress=False)
    live = {"w.weight": weight.clone()}
    bank = fm.AdapterBank.from_peft([adapter], live, dtype=torch.float32)
    fm.Switcher(live, bank).switch({"a": 0.5})
    merged = tensors_of(tmp_path / "out")["w.weight"]
    assert bits(merged) == bits(live["w.weight"])
    assert_merged(merged, weight, bank.target("w.weight"), [(0, 0.5)])


@pytest.mark.parametrize("gates", [(0.0,), (0.75, -0.75)])
def test_gate_zero_copies_bits(sharded, adapters, tmp_path, gates):
    merge_checkpoint(sharded, [(adapters["math"], gate) for gate in gates], tmp_path / "out", progress=False)
    before, after = tensors_of(sharded), tensors_of(tmp_path / "out")
    assert {name: bits(tensor) for name, tensor in before.items()} == {name: bits(tensor) for name, tensor in after.items()}


def test_the_same_directory_twice_adds_its_gates(llama, adapters, tmp_path):
    (tmp_path / "link").symlink_to(adapters["math"])
    merge_checkpoint(llama, [(adapters["math"], 0.5), (tmp_path / "link", 0.25)], tmp_path / "twice", progress=False)
    merge_checkpoint(llama, [(f"{adapters['math']}/", 0.75)], tmp_path / "once", progress=False)
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")


def test_callers_reduced_precision_does_not_reach_the_merge(tmp_path):
    """torch.set_float32_matmul_precision("medium") lets float32 products run in bfloat16, on processors that can."""
    base = one_weight(tmp_path / "base", torch.randn(256, 512, generator=torch.Generator().manual_seed(1)))
    adapter = write_adapter(tmp_path / "a", {"w": (256, 512)}, r=64)
    merge_checkpoint(base, [(adapter, 0.5)], tmp_path / "exact", progress=False)
    try:
        torch.set_float32_matmul_precision("medium")
        merge_checkpoint(base, [(adapter, 0.5)], tmp_path / "medium", progress=False)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert files_of(tmp_path / "medium") == files_of(tmp_path / "exact")


def test_overflow_is_an_error_and_not_an_infinite_weight(llama, tmp_path):
    adapter = q0_adapter(tmp_path / "a", scale=3.0)
    with pytest.raises(errors.FormatError, match=r"q_proj.*finite in torch\.float16"):
        merge_checkpoint(llama, [(adapter, 1e5)], tmp_path / "out", dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_nonfinite_base_weights_that_no_adapter_made_pass(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    tensors = tensors_of(llama)
    tensors[Q0][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors")
    merge_checkpoint(base, [(q0_adapter(tmp_path / "a"), 1)], tmp_path / "out", progress=False)
    assert torch.isnan(tensors_of(tmp_path / "out")[Q0]).nonzero().tolist() == [[3, 5]]


def test_mixture_is_recorded(sharded, adapters, mixture, tmp_path, capfd):
    import hashlib

    merge_checkpoint(sharded, mixture, tmp_path / "out")
    record = json.loads((tmp_path / "out/fusedmerge.json").read_text())
    assert record["fusedmerge_version"] == fm.__version__ and record["dtype"] is None and record["base"] == "base"
    math_, code = record["adapters"]
    assert (math_["name"], math_["gate"], code["name"], code["gate"]) == ("math", 0.7, "code", -0.4)
    assert math_["scaling"]["model.layers.0.mlp.down_proj.weight"] == 4.0 and math_["scaling"][Q0] == 1.5
    assert code["scaling"] == pytest.approx(4 / 5**0.5) and code["targets"] == 4
    for entry in record["adapters"]:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert entry["sha256"][name] == hashlib.sha256((adapters[entry["name"]] / name).read_bytes()).hexdigest()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()["fusedmerge"]) == record
    assert str(tmp_path) not in (tmp_path / "out/fusedmerge.json").read_text()
    out, err = capfd.readouterr()
    assert "merge: 100%" in err and not out


def test_a_tokenizer_s_chat_templates_are_carried_over(llama, adapters, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    merge_checkpoint(base, [(adapters["math"], 1.0)], tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    merge_checkpoint(base, [(adapters["math"], 0.5)], tmp_path / "out", overwrite=True, progress=False)


def test_what_is_carried_over(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / "consolidated.safetensors").write_bytes(b"stale")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "original").mkdir()
    (tmp_path / "blob").write_text("vocabulary")
    (base / "vocab.txt").symlink_to(tmp_path / "blob")
    merge_checkpoint(base, [(q0_adapter(tmp_path / "a"), 1)], tmp_path / "out", progress=False)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"}
    assert written == expected | {"model.safetensors", "fusedmerge.json"}
    assert not (tmp_path / "out/vocab.txt").is_symlink() and (tmp_path / "out/vocab.txt").read_text() == "vocabulary"


PEAK = """
    import resource, sys
    from fusedmerge.checkpoint import merge_checkpoint
    merge_checkpoint(sys.argv[1], [(sys.argv[2], 0.7)], sys.argv[3], progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """480 MB in tensors of 4 MB (bfloat16), all adapted; the interpreter and torch alone are two thirds of the allowance."""
    rows, cols, count = 1024, 2048, 116
    base = tmp_path / "base"
    base.mkdir()
    names = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(count)]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, cols, generator=generator) * 0.02).to(torch.bfloat16)
    files = [f"model-{index:05}.safetensors" for index in range(2)]
    weight_map = {}
    for index, file in enumerate(files):
        part = names[index :: len(files)]
        with StreamWriter(base / file, [((name, "BF16", weight.shape), weight.nbytes) for name in part], {}) as writer:
            for _ in part:
                writer.write(memoryview(bits(weight)))
        weight_map.update(dict.fromkeys(part, file))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    (base / "config.json").write_text(config.to_json_string())
    adapter = write_adapter(tmp_path / "a", {name.removesuffix(".weight"): (rows, cols) for name in names}, r=2)
    # Through a shell: a process that execs inherits the maximum of the one that forked it, which is this large one.
    script = [sys.executable, "-c", textwrap.dedent(PEAK), base, adapter, tmp_path / "out"]
    env = {**os.environ, "PYTHONPATH": str(Path(fm.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *script], capture_output=True, text=True, check=True, env=env)
    peak = int(done.stdout)
    working_set = rows * cols * 4
    assert peak < 1.5 * working_set + 300 * 2**20, f"{peak / 2**20:.0f} MiB"
    with safe_open(tmp_path / "out" / files[-1], "pt") as file:
        assert not torch.equal(file.get_tensor(names[len(files) - 1]), weight)
