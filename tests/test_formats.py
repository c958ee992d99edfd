"""read_peft: what PEFT saved, read back with the deltas that PEFT itself computes."""

from __future__ import annotations

import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fusedmerge.errors import FormatError
from fusedmerge.formats import read_peft, read_peft_model
from fusedmerge.formats.peft_config import _KNOWN, _REFUSED, LoraRule
from tests.formats_kit import (
    PICKLE,
    SAFETENSORS,
    Net,
    assert_same_deltas,
    deltas,
    peft_deltas,
    plain_config,
    plain_tensors,
    save,
    with_adapter,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:::peft")  # what PEFT says of odd configurations is not the subject


patterns = st.sampled_from(["q_proj", "up", "layers.0.up", r"^layers\.1\.q_proj", r"layers\.[01]\.down", "q_.*", "proj", "layers.0"])


@settings(max_examples=40, deadline=None)
@given(
    config=st.fixed_dictionaries(
        {
            "r": st.integers(1, 5),
            "lora_alpha": st.one_of(st.integers(-9, 9).filter(bool), st.floats(0.1, 50)),
            "rank_pattern": st.dictionaries(patterns, st.integers(1, 5), max_size=2),
            "alpha_pattern": st.dictionaries(patterns, st.integers(1, 20), max_size=2),
            "use_rslora": st.booleans(),
        }
    ),
    targets=st.sets(st.sampled_from(["q_proj", "layers.0.up", "down", "embed"]), min_size=1),
)
def test_deltas_equal_those_of_peft(tmp_path_factory, config, targets):
    directory = tmp_path_factory.mktemp("adapter")
    save(with_adapter(Net(), target_modules=sorted(targets), **config), directory)
    try:
        reloaded = peft.PeftModel.from_pretrained(Net(), directory)  # patterns as saved: PEFT sorts them, and the first match counts
    except RuntimeError:  # two patterns match and sorting swapped them: PEFT then finds tensors of another rank
        with pytest.raises(FormatError, match="expected rank"):
            read_peft(directory)
    else:
        assert_same_deltas(read_peft(directory), peft_deltas(reloaded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("file", [SAFETENSORS, PICKLE])
def test_factors_keep_bits_and_dtype(tmp_path, dtype, file):
    tensors = {key: tensor.to(dtype) for key, tensor in plain_tensors().items()}
    factors = read_peft(write(tmp_path, tensors=tensors, name=file)).targets["layer.q.weight"]
    assert factors.a.dtype == factors.b.dtype == dtype
    assert torch.equal(factors.a, tensors["base_model.model.layer.q.lora_A.weight"])
    assert torch.equal(factors.b, tensors["base_model.model.layer.q.lora_B.weight"])
    assert (factors.scaling, factors.rank, factors.transposed) == (2.0, 2, False)


def test_a_pickled_parameter_is_detached(tmp_path):
    tensors = {key: torch.nn.Parameter(tensor) for key, tensor in plain_tensors(**{"lm_head.weight": torch.ones(2, 3)}).items()}
    adapter = read_peft(write(tmp_path, tensors=tensors, name=PICKLE))
    assert not adapter.targets["layer.q.weight"].a.requires_grad
    assert not adapter.base_weights["lm_head.weight"].requires_grad


def test_safetensors_is_preferred(tmp_path):
    write(tmp_path, tensors={key: 2 * tensor for key, tensor in plain_tensors().items()}, name=PICKLE)
    a = read_peft(write(tmp_path)).targets["layer.q.weight"].a
    assert torch.equal(a, plain_tensors()["base_model.model.layer.q.lora_A.weight"])


def test_name(tmp_path, monkeypatch):
    directory = write(tmp_path / "math")
    assert read_peft(directory).name == "math"
    assert read_peft(f"{directory}{os.sep}").name == "math"
    assert read_peft(directory, name="code").name == "code"
    monkeypatch.chdir(directory)
    assert read_peft(".").name == "math"


@pytest.mark.parametrize("inner", ["", "base_layer.", "_orig_mod."])
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.base_model.model.", "base_model.model._orig_mod."])
@pytest.mark.parametrize("adapter", ["", ".default", ".my-adapter"])
def test_names_of_wrappers_and_adapters_are_dropped(tmp_path, inner, prefix, adapter):
    a, b = plain_tensors().values()
    tensors = {f"{prefix}layer.q.{inner}lora_A{adapter}.weight": a, f"{prefix}layer.q.{inner}lora_B{adapter}.weight": b}
    assert list(read_peft(write(tmp_path, tensors=tensors)).targets) == ["layer.q.weight"]


def test_conv1d_of_gpt2_is_transposed(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=8)
    model = with_adapter(transformers.GPT2LMHeadModel(config), target_modules=["c_attn", "c_proj", "wte"])
    save(model, tmp_path)
    adapter, (live,) = read_peft(tmp_path), read_peft_model(model)
    expected = peft_deltas(model)
    assert_same_deltas(adapter, expected)
    assert_same_deltas(live, expected)
    assert all(factors.transposed for factors in adapter.targets.values())
    stored = dict(model.get_base_model().named_parameters())
    for target, delta in deltas(adapter).items():
        assert delta.shape == stored[target.replace(".weight", ".base_layer.weight")].shape


def test_embedding_with_its_saved_base(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=14, tie_word_embeddings=False
    )
    model = with_adapter(transformers.LlamaForCausalLM(config), target_modules=["embed_tokens", "v_proj"])
    save(model, tmp_path)
    adapter = read_peft(tmp_path)
    base = model.get_base_model().model.embed_tokens.base_layer.weight.clone()
    assert_same_deltas(adapter, peft_deltas(model))
    assert (
        adapter.targets["model.embed_tokens.weight"].transposed and not adapter.targets["model.layers.0.self_attn.v_proj.weight"].transposed
    )
    assert torch.equal(adapter.base_weights["model.embed_tokens.weight"], base)


def test_base_weights_are_kept_apart(tmp_path):
    head = torch.arange(6.0).reshape(2, 3)
    adapter = read_peft(write(tmp_path, tensors=plain_tensors(**{"base_model.model.lm_head.weight": head})))
    assert list(adapter.targets) == ["layer.q.weight"]
    assert torch.equal(adapter.base_weights["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("fields", "rank", "scaling"),
    [
        ({"lora_alpha": 0}, 2, 0.0),
        ({"lora_alpha": -3}, 2, -1.5),
        ({"use_rslora": True, "r": 4}, 4, 2.0),
        ({"rank_pattern": {"q": 4}}, 4, 1.0),
        ({"rank_pattern": {"^layer.q": 8}, "use_rslora": True, "lora_alpha": 6}, 8, 6 / 8**0.5),
        ({"rank_pattern": {"ayer.q": 8}}, 2, 2.0),  # a pattern starts at a dot
        ({"rank_pattern": {"q": 4, "layer.q": 8}}, 4, 1.0),  # the first that matches
        ({"alpha_pattern": {"layer": 7}}, 2, 2.0),  # a pattern reaches the end
        ({"alpha_pattern": {"k": 9, r".*\.q": 7}}, 2, 3.5),
        ({"rank_pattern": None, "alpha_pattern": None, "use_rslora": None}, 2, 2.0),
    ],
)
def test_rank_and_scaling(fields, rank, scaling):
    assert LoraRule.of(plain_config(**fields), "test").scale("layer.q") == (rank, pytest.approx(scaling, rel=1e-15))


def test_a_pattern_that_is_a_name_and_no_expression_for_it():
    assert LoraRule.of(plain_config(rank_pattern={"a+b": 7}), "test").scale("a+b") == (7, 4 / 7)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base(tmp_path, init):
    assert read_peft(write(tmp_path, plain_config(init_lora_weights=init))).targets


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.1, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "qalora_group_size": 16},
        {"target_modules": ".*q", "layers_pattern": "layers", "megatron_core": "megatron.core", "exclude_modules": ["k"]},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ["q", "k"], "exclude_modules": ["k"]},
        {"target_modules": ["q", "k"], "layers_to_transform": [0]},
        {"auto_mapping": {"base_model_class": "X"}, "peft_version": "9.9", "revision": "main", "inference_mode": True},
        {"a_later_variant": None, "another": False, "third": {}, "bias": "none", "modules_to_save": []},
    ],
)
def test_harmless_fields(tmp_path, fields):
    adapter = read_peft(write(tmp_path, plain_config(**fields)))
    assert list(adapter.targets) == ["layer.q.weight"]
    assert adapter.config == plain_config(**fields)


def test_every_field_of_the_installed_peft_is_decided():
    assert set(peft.LoraConfig(r=2).to_dict()) <= _KNOWN | set(_REFUSED)


def test_importing_needs_no_torch():
    code = "import sys, fusedmerge.formats; sys.exit(sum(name in sys.modules for name in ('torch', 'safetensors', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_peft_saved_is_what_was_read(tmp_path):
    """The tensors of the file, none left out."""
    save(with_adapter(Net(), target_modules=["q_proj", "embed"]), tmp_path)
    adapter = read_peft(tmp_path)
    saved = load_file(tmp_path / SAFETENSORS)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(f.a.numel() + f.b.numel() for f in adapter.targets.values())
