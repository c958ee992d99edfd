"""The offline merge: values, names, tied and quantised weights, and that a checkpoint appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fusedmerge as fm
from fusedmerge import checkpoint, checkpoint_files, checkpoint_names, errors, reference
from fusedmerge.checkpoint import merge_checkpoint, parse_adapter_argument
from fusedmerge.formats.peft import read_peft
from fusedmerge.safetensors_stream import StreamWriter, read_header
from tests.kit import CORRECT_SHARE, assert_merged, bits

Q0 = "model.layers.0.self_attn.q_proj.weight"
SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---------------------------------------------------------------------- material


def build(kind, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **config)),
        "headless": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **config)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **config)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3, **config)),
        "llava": lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**SIZES),
                vision_config=transformers.CLIPVisionConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
                ),
            )
        ),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # norms and biases, too, are then told apart
    return model.to(dtype).eval()


def save(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def write_adapter(directory, shapes, r=4, alpha=6, seed=0, scale=0.1, extra=None, dtype=torch.float32, **config):
    """A PEFT directory by hand: {module: (out, in)}; signed factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for module, (rows, cols) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = (torch.randn(r, cols, generator=generator) * scale).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (torch.randn(rows, r, generator=generator) * scale).to(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": targets, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def q0_adapter(directory, prefix="model.", **kwargs):
    return write_adapter(directory, {f"{prefix}layers.0.self_attn.q_proj": (48, 48)}, **kwargs)


def peft_adapters(model, directory, configs):
    """Adapters by PEFT itself, both factors random: {name: directory}."""
    names = list(configs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**configs[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, peft.LoraConfig(**configs[name]))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(directory)
    return {name: directory / name for name in names}


def peft_merged(kind_directory, auto, paths, gates):
    """PEFT's own merge, in float32."""
    model = auto.from_pretrained(kind_directory, dtype=torch.float32)
    first, *others = paths
    model = peft.PeftModel.from_pretrained(model, paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, gate in gates.items():
                module.set_scale(name, gate)
    return model.merge_and_unload(adapter_names=list(gates)).eval()


def tensors_of(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def partial_of(out):
    return out.with_name(f".{out.name}.partial")


def assert_tensors(base, out, adapters, disk_name=lambda target: target, dtype=None):
    """Every adapted tensor is the mixture's truth rounded once; every other one has the base's bits."""
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    experts = {}
    for directory, gate in adapters:
        for target, factors in read_peft(directory).targets.items():
            name = disk_name(target)
            stored = factors.oriented(tuple(before[name].shape), None, "test", name)
            a, b = reference.to_float64(stored.a), reference.to_float64(stored.b)
            experts.setdefault(name, []).append(reference.Member(a, b, stored.scaling, gate))
    for name, tensor in after.items():
        if name not in experts:
            wanted = before[name] if dtype is None or not tensor.is_floating_point() else before[name].to(dtype)
            assert tensor.dtype == wanted.dtype and bits(tensor) == bits(wanted), name
            continue
        assert tensor.dtype == (dtype or before[name].dtype)
        kind = str(tensor.dtype).removeprefix("torch.")
        base64, got = reference.to_float64(before[name]), reference.to_float64(tensor)
        truth = reference.merged(base64, experts[name])
        assert np.abs(truth - base64).max() > 1e-4
        assert np.all(np.abs(got - truth) <= reference.error_bound(base64, experts[name], kind)), name
        correct = np.mean(got == reference.round_to(truth, kind))
        assert correct >= CORRECT_SHARE[tensor.dtype], (name, correct)
    return experts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A bfloat16 Llama in several shards, with a tokenizer's files beside it."""
    return save(build("llama", torch.bfloat16), tmp_path_factory.mktemp("sharded") / "base", max_shard_size="20KB")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of PEFT's own making, with rslora, a rank pattern and partial targets."""
    configs = {
        "math": {"r": 8, "lora_alpha": 12, "target_modules": EVERYTHING, "rank_pattern": {"down_proj": 3}},
        "code": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    }
    return peft_adapters(build("llama"), tmp_path_factory.mktemp("adapters"), configs)


@pytest.fixture
def mixture(adapters):
    return [(adapters["math"], 0.7), (adapters["code"], -0.4)]


def ids(vocab=96):
    return torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(3))


def assert_same_logits(out, expected, auto=transformers.AutoModelForCausalLM):
    model = auto.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        got, wanted = model(ids()).logits, expected(ids()).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


# ---------------------------------------------------------------------- values


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
    monkeypatch.setattr(checkpoint, "describe", lambda *_: checkpoint_names.Rules())
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


# ---------------------------------------------------------------------- the record


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


# ---------------------------------------------------------------------- names


def test_mixtral_attention_adapter_merges_and_matches_peft(tmp_path):
    base = save(build("mixtral"), tmp_path / "base")
    assert any("block_sparse_moe" in name for name in tensors_of(base))  # the files do not have memory's names
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    paths = peft_adapters(build("mixtral"), tmp_path / "adapters", {"one": config})
    merge_checkpoint(base, [(paths["one"], 1.1)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(paths["one"], 1.1)])
    assert_same_logits(tmp_path / "out", peft_merged(base, transformers.AutoModelForCausalLM, paths, {"one": 1.1}))


def test_renamed_router_is_found_under_both_names(tmp_path):
    base = save(build("mixtral"), tmp_path / "base")
    for place in ("mlp", "block_sparse_moe"):
        adapter = write_adapter(tmp_path / place, {f"model.layers.1.{place}.gate": (3, 48)})
        out = tmp_path / f"out_{place}"
        merge_checkpoint(base, [(adapter, 1)], out, progress=False)
        assert_tensors(base, out, [(adapter, 1)], lambda name: name.replace(".mlp.", ".block_sparse_moe."))


def test_weights_that_exist_only_fused_in_memory_are_refused(tmp_path):
    base = save(build("mixtral"), tmp_path / "base")
    shapes = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.0.mlp.experts.down_proj": (48, 80)}
    adapter = write_adapter(tmp_path / "a", shapes)
    with pytest.raises(errors.UnknownNameError, match=r"no model\.layers\.0\.mlp\.experts\.down_proj\.weight") as caught:
        merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert "q_proj" not in str(caught.value)
    assert not partial_of(tmp_path / "out").exists()


def test_experts_by_their_names_in_the_files(tmp_path):
    """Adapters from before the experts were fused name what the files hold."""
    base = save(build("mixtral"), tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", {"model.layers.0.block_sparse_moe.experts.2.w2": (48, 80)})
    merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(adapter, 1)])


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_vision_language_model_by_its_names_in_memory_and_in_the_files(tmp_path, prefix):
    base = save(build("llava"), tmp_path / "base")
    disk = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert disk in tensors_of(base)
    adapter = q0_adapter(tmp_path / "a", prefix)
    merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(adapter, 1)], lambda _: disk)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert bits(model.model.language_model.layers[0].self_attn.q_proj.weight) == bits(tensors_of(tmp_path / "out")[disk])


@pytest.mark.parametrize(("kind", "prefix"), [("llama", ""), ("headless", "model."), ("headless", "")])
def test_base_model_prefix_comes_and_goes(tmp_path, kind, prefix):
    """An adapter trained without the head on a checkpoint with one, and the reverse."""
    base = save(build(kind), tmp_path / "base")
    disk = "layers.0.self_attn.q_proj.weight" if kind == "headless" else Q0
    adapter = q0_adapter(tmp_path / "a", prefix)
    merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(adapter, 1)], lambda _: disk)


def test_adapters_that_spell_a_target_differently_meet_on_it(llama, tmp_path):
    pair = [(q0_adapter(tmp_path / "with", seed=1), 0.5), (q0_adapter(tmp_path / "without", "", seed=2), 0.25)]
    merge_checkpoint(llama, pair, tmp_path / "out", progress=False)
    experts = assert_tensors(llama, tmp_path / "out", pair, lambda _: Q0)
    assert len(experts[Q0]) == 2


def test_one_adapter_may_not_name_a_tensor_twice(llama, tmp_path):
    shapes = {"model.layers.0.self_attn.q_proj": (48, 48), "layers.0.self_attn.q_proj": (48, 48)}
    with pytest.raises(errors.FormatError, match="a tensor of its own"):
        merge_checkpoint(llama, [(write_adapter(tmp_path / "a", shapes), 1)], tmp_path / "out", progress=False)


def test_unmatched_targets_are_listed(llama, tmp_path):
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (48, 48) for layer in range(9)}
    with pytest.raises(errors.UnknownNameError, match=r"no model\.layers\.2\..*layers\.6\.self_attn\.q_proj\.weight and 2 more"):
        merge_checkpoint(llama, [(write_adapter(tmp_path / "a", shapes), 1)], tmp_path / "out", progress=False)


def test_ambiguous_name_is_refused():
    rules = checkpoint_names.Rules(memory={"x.weight": "y.weight", "y.weight": "z.weight"})
    names = checkpoint_names.NameMap(["x.weight", "y.weight"], {}, rules)
    with pytest.raises(errors.FormatError, match=r"one tensor of the checkpoint, got x\.weight and y\.weight"):
        names.find(["y.weight"], "a", "merge")


def test_values_that_change_under_one_name_are_refused():
    """A converter that permutes q_proj but keeps its name: the adapter's delta is not in the file's order."""
    names = checkpoint_names.NameMap(["q_proj.weight"], {}, checkpoint_names.Rules(converted=["q_proj.weight"], made=["q_proj.weight"]))
    with pytest.raises(errors.UnknownNameError, match="makes that weight from other tensors"):
        names.find(["q_proj.weight"], "a", "merge")


def test_child_process_answers_as_this_process(tmp_path):
    """Where transformers is not loaded, it is asked in a process that ends before the merge begins."""
    base = save(build("mixtral"), tmp_path / "base")
    disk = list(tensors_of(base))
    config = json.loads((base / "config.json").read_text())
    here = checkpoint_names.describe(base, config, disk)
    assert here.converted and here.memory
    script = """
        import json, sys
        from dataclasses import asdict
        from pathlib import Path
        from fusedmerge.checkpoint_names import describe
        rules = describe(Path("base"), json.loads(sys.argv[1]), json.loads(sys.argv[2]))
        assert "transformers" not in sys.modules and "torch" not in sys.modules
        print(json.dumps(asdict(rules)))
    """
    done = run_python(script, json.dumps(config), json.dumps(disk), cwd=tmp_path)
    assert checkpoint_names.Rules(**json.loads(done.stdout)) == here


def test_unbuildable_model_class_falls_back_to_the_files_names(llama, caplog):
    config = {"architectures": ["LlamaForCausalLM"]}
    disk = list(tensors_of(llama))
    assert checkpoint_names.describe(llama, {"architectures": ["NoSuchModel"]}, disk) == checkpoint_names.Rules()
    assert not caplog.text  # a model of somebody's own code
    assert checkpoint_names.describe(llama / "nowhere", config, disk) == checkpoint_names.Rules()
    assert "could not build LlamaForCausalLM" in caplog.text


def run_python(script, *arguments, **kwargs):
    root = str(Path(fm.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True, **kwargs)


# ---------------------------------------------------------------------- tied, quantised, carried


@pytest.mark.parametrize("with_transformers", [True, False])
@pytest.mark.parametrize(("kind", "module"), [
    ("llama", "lm_head"), ("llama", "model.embed_tokens"), ("llama", "embed_tokens"), ("gpt2", "lm_head"), ("gpt2", "transformer.wte"),
])  # fmt: skip
def test_tied_weights_are_refused(tmp_path, monkeypatch, kind, module, with_transformers):
    if not with_transformers:
        monkeypatch.setattr(checkpoint, "describe", lambda *_: checkpoint_names.Rules())
    base = save(build(kind, tie_word_embeddings=True), tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", {module: (96, 48)})
    with pytest.raises(errors.StateError, match="tied to"):
        merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert not partial_of(tmp_path / "out").exists()


def test_tie_that_the_configuration_leaves_to_its_default(tmp_path, monkeypatch):
    """Old configurations do not say that they tie: no head in the files of a causal model tells it."""
    monkeypatch.setattr(checkpoint, "describe", lambda *_: checkpoint_names.Rules())
    base = save(build("gpt2"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    for module in ("lm_head", "transformer.wte"):
        with pytest.raises(errors.StateError, match="tied to"):
            merge_checkpoint(base, [(write_adapter(tmp_path / module, {module: (96, 48)}), 1)], tmp_path / "out", progress=False)


def test_tied_model_takes_other_adapters_and_stays_tied(tmp_path):
    base = save(build("llama", tie_word_embeddings=True), tmp_path / "base")
    assert "lm_head.weight" not in tensors_of(base)
    adapter = q0_adapter(tmp_path / "a")
    merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert_tensors(base, tmp_path / "out", [(adapter, 1)])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_untied_head_and_embedding_take_adapters(llama, tmp_path):
    """lora_embedding factors are A [r, vocab] and B [dim, r] of a weight [vocab, dim]."""
    config = {"r": 4, "lora_alpha": 2, "target_modules": ["embed_tokens", "lm_head"]}
    paths = peft_adapters(build("llama"), tmp_path / "adapters", {"one": config})
    assert read_peft(paths["one"]).targets["model.embed_tokens.weight"].transposed
    merge_checkpoint(llama, [(paths["one"], 0.8)], tmp_path / "out", progress=False)
    assert_tensors(llama, tmp_path / "out", [(paths["one"], 0.8)])
    assert_same_logits(tmp_path / "out", peft_merged(llama, transformers.AutoModelForCausalLM, paths, {"one": 0.8}))


def test_base_weights_in_an_adapters_file_must_be_the_bases_own(tmp_path):
    base = save(build("llama", tie_word_embeddings=True), tmp_path / "base")
    embedding = tensors_of(base)["model.embed_tokens.weight"]
    other = embedding.clone()
    other[95, 47] = other[95, 47].nextafter(torch.tensor(9.0))
    key, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    for label, extra in {"same": {key: embedding}, "tied": {head: embedding}}.items():
        merge_checkpoint(base, [(q0_adapter(tmp_path / label, extra=extra), 1)], tmp_path / f"out_{label}", progress=False)
    wrong = {
        "ulp": {key: other},
        "dtype": {key: embedding.view(torch.int32)},
        "shape": {key: embedding[:-1].contiguous()},
        "name": {"base_model.model.model.other.weight": embedding},
    }
    for label, extra in wrong.items():
        with pytest.raises(errors.FormatError, match="bits of the checkpoint's own weight"):
            merge_checkpoint(base, [(q0_adapter(tmp_path / label, extra=extra), 1)], tmp_path / "out", progress=False)


def test_quantised_bases_are_refused(llama, tmp_path):
    adapter = q0_adapter(tmp_path / "a")
    config = json.loads((llama / "config.json").read_text())
    for place in ({"quantization_config": {"bits": 4}}, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}):
        base = shutil.copytree(llama, tmp_path / "base", dirs_exist_ok=True)
        (base / "config.json").write_text(json.dumps({**config, **place}))
        with pytest.raises(errors.FormatError, match="merge into the unquantised base"):
            merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    (base / "config.json").write_text(json.dumps(config))
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64):
        save_file({**tensors_of(llama), Q0: torch.zeros(48, 48).to(dtype)}, base / "model.safetensors")
        with pytest.raises(errors.DtypeError, match="merge into the unquantised base"):
            merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)


# ---------------------------------------------------------------------- whole or not at all


KILLED = """
    import sys, time
    from fusedmerge import checkpoint
    merge = checkpoint.merge_rows
    def slow(*arguments):
        time.sleep(0.02)
        merge(*arguments)
    checkpoint.merge_rows = slow
    checkpoint.describe = lambda *_: checkpoint.NameMap.__init__.__globals__["Rules"]()
    checkpoint.merge_checkpoint(sys.argv[1], [(sys.argv[2], 0.7), (sys.argv[3], -0.4)], sys.argv[4], progress=False)
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


def written(monkeypatch):
    """The shards that a merge writes from now on."""
    names = []
    work = checkpoint._write_shard

    def noting(header, layouts, jobs, path, *rest):
        names.append(path.name)
        work(header, layouts, jobs, path, *rest)

    monkeypatch.setattr(checkpoint, "_write_shard", noting)
    return names


def shard_names(directory):
    return sorted(path.name for path in directory.glob("*.safetensors"))


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
    work = checkpoint._write_shard

    def meanwhile(*arguments):
        with pytest.raises(errors.StateError, match="no other run that writes it"):
            merge_checkpoint(llama, [(adapter, 2)], tmp_path / "out", progress=False)
        work(*arguments)

    monkeypatch.setattr(checkpoint, "_write_shard", meanwhile)
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
    aside = checkpoint_files._aside(out)
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


# ---------------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------------- memory


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
