"""The offline merge: names on disk and in memory; tied, quantised and carried weights."""

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
from safetensors.torch import save_file

import fusedmerge as fm
from fusedmerge import errors
from fusedmerge.checkpoint import merge, merge_checkpoint, names
from fusedmerge.formats.peft import read_peft
from tests.checkpoint.material import (
    Q0,
    assert_same_logits,
    assert_tensors,
    build,
    partial_of,
    peft_adapters,
    peft_merged,
    q0_adapter,
    save,
    tensors_of,
    write_adapter,
)
from tests.kit import bits


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
    rules = names.Rules(memory={"x.weight": "y.weight", "y.weight": "z.weight"})
    found = names.NameMap(["x.weight", "y.weight"], {}, rules)
    with pytest.raises(errors.FormatError, match=r"one tensor of the checkpoint, got x\.weight and y\.weight"):
        found.find(["y.weight"], "a", "merge")


def test_values_that_change_under_one_name_are_refused():
    """A converter that permutes q_proj but keeps its name: the adapter's delta is not in the file's order."""
    found = names.NameMap(["q_proj.weight"], {}, names.Rules(converted=["q_proj.weight"], made=["q_proj.weight"]))
    with pytest.raises(errors.UnknownNameError, match="makes that weight from other tensors"):
        found.find(["q_proj.weight"], "a", "merge")


@pytest.mark.slow
def test_child_process_answers_as_this_process(tmp_path):
    """Where transformers is not loaded, it is asked in a process that ends before the merge begins."""
    base = save(build("mixtral"), tmp_path / "base")
    disk = list(tensors_of(base))
    config = json.loads((base / "config.json").read_text())
    here = names.describe(base, config, disk)
    assert here.converted and here.memory
    script = """
        import json, sys
        from dataclasses import asdict
        from pathlib import Path
        from fusedmerge.checkpoint.names import describe
        rules = describe(Path("base"), json.loads(sys.argv[1]), json.loads(sys.argv[2]))
        assert "transformers" not in sys.modules and "torch" not in sys.modules
        print(json.dumps(asdict(rules)))
    """
    done = run_python(script, json.dumps(config), json.dumps(disk), cwd=tmp_path)
    assert names.Rules(**json.loads(done.stdout)) == here


def test_unbuildable_model_class_falls_back_to_the_files_names(llama, caplog):
    config = {"architectures": ["LlamaForCausalLM"]}
    disk = list(tensors_of(llama))
    assert names.describe(llama, {"architectures": ["NoSuchModel"]}, disk) == names.Rules()
    assert not caplog.text  # a model of somebody's own code
    assert names.describe(llama / "nowhere", config, disk) == names.Rules()
    assert "could not build LlamaForCausalLM" in caplog.text


def run_python(script, *arguments, **kwargs):
    root = str(Path(fm.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True, **kwargs)


@pytest.mark.parametrize("with_transformers", [True, False])
@pytest.mark.parametrize(("kind", "module"), [
    ("llama", "lm_head"), ("llama", "model.embed_tokens"), ("llama", "embed_tokens"), ("gpt2", "lm_head"), ("gpt2", "transformer.wte"),
])  # fmt: skip
def test_tied_weights_are_refused(tmp_path, monkeypatch, kind, module, with_transformers):
    if not with_transformers:
        monkeypatch.setattr(merge, "describe", lambda *_: names.Rules())
    base = save(build(kind, tie_word_embeddings=True), tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", {module: (96, 48)})
    with pytest.raises(errors.StateError, match="tied to"):
        merge_checkpoint(base, [(adapter, 1)], tmp_path / "out", progress=False)
    assert not partial_of(tmp_path / "out").exists()


def test_tie_that_the_configuration_leaves_to_its_default(tmp_path, monkeypatch):
    """Old configurations do not say that they tie: no head in the files of a causal model tells it."""
    monkeypatch.setattr(merge, "describe", lambda *_: names.Rules())
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
