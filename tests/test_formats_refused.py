"""read_peft: a refusal for each configuration, tensor or file that would merge silently wrong."""

from __future__ import annotations

import contextlib
import os
import pickle

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmerge.errors import FormatError, FusedMergeError, InvalidTypeError, MissingFileError
from fusedmerge.formats import read_peft
from tests.formats_kit import CONFIG, PICKLE, SAFETENSORS, Net, plain_config, plain_tensors, save, with_adapter, write

pytestmark = pytest.mark.filterwarnings("ignore:::peft")  # what PEFT says of odd configurations is not the subject


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected LORA, got 'LOHA'"),
        ({"peft_type": None}, "peft_type: expected LORA, got None"),
        ({"use_dora": True}, "use_dora: .*DoRA"),
        ({"lora_bias": True}, "lora_bias: .*bias of lora_B"),
        ({"bias": "all"}, "bias: .*trained biases .*got 'all'"),
        ({"bias": "lora_only"}, "bias: .*got 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*got .*lm_head"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: .*token rows"),
        ({"target_parameters": ["experts.up"]}, "target_parameters: .*expert parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: .*copies"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying: .*tied"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: .*invocation"),
        ({"use_qalora": True}, "use_qalora: .*pools"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: .*block-diagonal"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config: .*each token"),
        ({"kasa_config": {"beta": 1}}, "kasa_config: .*truncates"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config: .*samples"),
        ({"velora_config": {"num_groups": 64}}, "velora_config: .*VeLoRA"),
        ({"enable_lora": [True, False]}, "enable_lora: .*merged projection"),
        *[
            ({"init_lora_weights": init}, f"init_lora_weights: .*leaves the base.*got '{init}'")
            for init in ("pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq", "something_new")
        ],
        ({"use_new_variant": True}, "use_new_variant: .*field this version knows"),
        ({"new_config": {"x": 1}}, "new_config: .*got {'x': 1}"),
        ({"r": "8"}, "r: expected a positive integer, got '8'"),
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": -1}, "r: expected a positive integer, got -1"),
        ({"r": True}, "r: expected a positive integer, got True"),
        ({"r": 2.0}, "r: expected a positive integer, got 2.0"),
        ({"r": None}, "r: expected a positive integer, got None"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, got None"),
        ({"lora_alpha": True}, "lora_alpha: expected a finite number, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number, got 1000"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out: expected true or false, got 1"),
        ({"rank_pattern": ["q"]}, "rank_pattern: expected an object"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: expected a positive integer, got 0"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]: expected a finite number"),
        ({"rank_pattern": {"(q": 4}}, r"rank_pattern: expected regular expressions, got '\(q'"),
        ({"r": 4}, r"q.lora_A.weight: expected rank 4, got rank 2 \(shape \[2, 6\]\)"),
        ({"rank_pattern": {"q": 3}}, "q.lora_A.weight: expected rank 3, got rank 2"),
    ],
)
def test_config_refusals(tmp_path, fields, message):
    with pytest.raises(FormatError, match=f"^read_peft: (base_model.model.layer.)?{message}"):
        read_peft(write(tmp_path, plain_config(**fields)))


def change(**changes):
    """The plain tensors with some of them changed: `A=` and `B=` stand for the factors' keys; None removes one."""
    keys = {"A": "base_model.model.layer.q.lora_A.weight", "B": "base_model.model.layer.q.lora_B.weight"}
    tensors = plain_tensors(**{keys.get(key, key): value for key, value in changes.items()})
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


NAN = torch.tensor([[0.0, 1, 2, 3, 4, float("nan")]] * 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (change(B=None), "layer.q.weight: expected a lora_A and a lora_B, got base_model.model.layer.q.lora_A.weight without its lora_B"),
        (change(A=None), "layer.q.weight: .*lora_B.weight without its lora_A"),
        (change(B=torch.ones(5, 3)), r"q.lora_B.weight: expected rank 2, got rank 3 \(shape \[5, 3\]\)"),
        (change(A=torch.ones(2, 6, 1, 1)), r"q.lora_A.weight: .*convolution.*\[2, 6, 1, 1\]"),
        (change(A=torch.ones(2, 6, 1)), "q.lora_A.weight: .*convolution"),
        (change(A=torch.ones(12)), r"q.lora_A.weight: .*gathered.*\[12\]"),
        (change(A=torch.ones(2, 0)), r"q.lora_A.weight: .*gathered.*\[2, 0\]"),
        (change(A=NAN), "q.lora_A.weight: expected finite values, got 2"),
        (change(B=torch.full((5, 2), float("inf"), dtype=torch.bfloat16)), "q.lora_B.weight: expected finite values, got 10"),
        (change(A=torch.ones(2, 6, dtype=torch.int8)), "q.lora_A.weight: expected bfloat16.*got torch.int8"),
        (change(A=torch.ones(2, 6).to(torch.float8_e4m3fn)), "q.lora_A.weight: expected bfloat16.*got torch.float8_e4m3fn"),
        (change(A=torch.ones(2, 6, dtype=torch.complex64)), "q.lora_A.weight: expected bfloat16.*got torch.complex64"),
        (change(**{"x.lora_magnitude_vector": torch.ones(5)}), "tensors: .*got x.lora_magnitude_vector$"),
        (change(**{"x.lora_B.bias": torch.ones(5)}), "tensors: .*got x.lora_B.bias$"),
        (change(**{"x.lora_B.a.b.weight": torch.ones(5)}), "tensors: .*got x.lora_B.a.b.weight$"),
        (change(**{"x.bias": torch.ones(5)}), "tensors: .*got x.bias$"),
        (change(**{f"x{i}.ia3": torch.ones(5) for i in range(8)}), "tensors: .*got x0.ia3, x1.ia3, x2.ia3, x3.ia3, x4.ia3 and 3 more$"),
        (change(**{"layer.q.lora_A.weight": torch.ones(2, 6)}), "tensors: expected one tensor of each name .*layer.q.lora_A.weight"),
        (change(**{"h.weight": torch.ones(2), "base_model.model.h.weight": torch.ones(2)}), "tensors: expected one tensor of each name"),
        (change(**{"k.lora_A.other.weight": torch.ones(2, 6)}), "tensors: expected one adapter, got adapters named '', 'other'"),
        (change(**{"layer.q.lora_embedding_A": torch.ones(2, 6)}), "tensors: .*factors of both for layer.q.weight"),
        ({"h.weight": torch.ones(2, 2)}, "tensors: expected the factors of at least one module, got none"),
    ],
)
def test_tensor_refusals(tmp_path, tensors, message):
    with pytest.raises(FormatError, match=f"^read_peft: (base_model.model.layer.)?{message}"):
        read_peft(write(tmp_path, tensors=tensors))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (plain_tensors() | {"base_model.model.layer.q.lora_A.weight": torch.eye(2, 6).to_sparse()}, "dense tensor.*sparse"),
        (plain_tensors() | {"base_model.model.layer.q.lora_A.weight": torch.empty(2, 6, device="meta")}, "dense tensor.*meta"),
        (plain_tensors() | {"h.weight": torch.eye(3).to_sparse()}, "h.weight: expected a dense tensor"),
        (plain_tensors() | {"epoch": 3}, "int under 'epoch'"),
        (list(plain_tensors().values()), "mapping of names to tensors, got list"),
        ({}, "at least one tensor"),
    ],
)
def test_pickle_refusals(tmp_path, content, message):
    with pytest.raises(FormatError, match=message):
        read_peft(write(tmp_path, tensors=content, name=PICKLE))


class MakesDirectory:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    write(tmp_path, name=PICKLE)
    (tmp_path / PICKLE).write_bytes(pickle.dumps({"x": MakesDirectory(tmp_path / "ran")}, protocol=2))
    with pytest.raises(FormatError, match="adapter_model.bin: expected a whole file of tensors"):
        read_peft(tmp_path)
    torch.save({"x": MakesDirectory(tmp_path / "ran")}, tmp_path / PICKLE)
    with pytest.raises(FormatError, match="adapter_model.bin: expected a whole file of tensors"):
        read_peft(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "nul", '{"r": 2', "\xff", "[" * 100_000])
def test_damaged_json(tmp_path, text):
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match="adapter_config.json: expected valid JSON"):
        read_peft(tmp_path)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"LORA"', "str")])
def test_json_that_is_not_an_object(tmp_path, text, kind):
    write(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=f"adapter_config.json: expected a JSON object, got a JSON {kind}"):
        read_peft(tmp_path)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from([SAFETENSORS, PICKLE]))
def test_truncated_files(tmp_path_factory, data, name):
    path = write(tmp_path_factory.mktemp("adapter"), name=name) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FormatError, match=f"{name}: expected a whole file of tensors"):
        read_peft(path.parent)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from([SAFETENSORS, PICKLE, CONFIG]))
def test_damaged_files_raise_typed_errors_only(tmp_path_factory, data, name):
    path = write(tmp_path_factory.mktemp("adapter"), name=PICKLE if name == PICKLE else SAFETENSORS) / name
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(FusedMergeError):
        read_peft(path.parent)


def test_one_file_under_the_other_name(tmp_path):
    write(tmp_path, name=PICKLE)
    (tmp_path / PICKLE).rename(tmp_path / SAFETENSORS)
    with pytest.raises(FormatError, match="adapter_model.safetensors: expected a whole file of tensors"):
        read_peft(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(MissingFileError, match="directory: expected an adapter's directory, got .*nowhere"):
        read_peft(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="expected a file adapter_config.json, got none"):
        read_peft(tmp_path)
    (write(tmp_path) / SAFETENSORS).unlink()
    with pytest.raises(FileNotFoundError, match="expected a file adapter_model.safetensors or adapter_model.bin, got neither"):
        read_peft(tmp_path)
    with pytest.raises(MissingFileError, match="which is not one"):
        read_peft(tmp_path / CONFIG)
    with pytest.raises(InvalidTypeError, match="directory: expected a path, got int"):
        read_peft(3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["down"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed": [1, 2]}}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_modules": [], "target_parameters": ["up.weight"]}, "target_parameters"),
        ({"target_modules": ["conv"]}, "convolution"),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=2)}, "velora_config"),
    ],
)
def test_what_peft_writes_for_a_variant_is_refused(tmp_path, config, message):
    save(with_adapter(Net(), **config), tmp_path)
    with pytest.raises(FormatError, match=message):
        read_peft(tmp_path)


def test_another_method_of_peft_is_refused(tmp_path):
    save(peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(FormatError, match="peft_type: expected LORA, got 'LOHA'"):
        read_peft(tmp_path)
