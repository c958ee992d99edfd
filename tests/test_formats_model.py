"""read_peft_model: adapters that live in a model, and what of them is refused."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from fusedmerge.errors import FormatError, InvalidTypeError, StateError
from fusedmerge.formats import read_peft_model
from tests.formats_kit import Net, assert_same_deltas, peft_deltas, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore:::peft")  # what PEFT says of odd configurations is not the subject


def test_adapters_of_a_model():
    model = with_adapter(Net(), "math", seed=1, target_modules=["q_proj", "embed"], rank_pattern={"layers.0.q_proj": 2})
    model = with_adapter(model, "code", seed=2, r=4, target_modules=["up", "layers.1.q_proj"], use_rslora=True)
    math, code = read_peft_model(model)
    assert (math.name, code.name, code.config["r"]) == ("math", "code", 4)
    assert set(code.targets) == {"layers.0.up.weight", "layers.1.up.weight", "layers.1.q_proj.weight"}
    live = model.base_model.model.layers[0].q_proj.lora_A["math"].weight
    assert math.targets["layers.0.q_proj.weight"].a.data_ptr() == live.data_ptr()
    assert not math.targets["layers.0.q_proj.weight"].a.requires_grad
    expected = {"math": peft_deltas(model, "math"), "code": peft_deltas(model, "code")}
    assert_same_deltas(math, expected["math"])
    assert_same_deltas(code, expected["code"])


def test_linear_beside_conv1d():
    """GPT-2's Conv1D stores [in, out], its head [out, in]; PEFT keeps one fan_in_fan_out in the configuration, and one per module."""
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, n_positions=8, tie_word_embeddings=False)
    model = with_adapter(transformers.GPT2LMHeadModel(config), target_modules=["c_proj", "lm_head"])
    (adapter,) = read_peft_model(model)
    assert {target: factors.transposed for target, factors in adapter.targets.items()} == {
        "transformer.h.0.attn.c_proj.weight": True,
        "transformer.h.0.mlp.c_proj.weight": True,
        "lm_head.weight": False,
    }
    assert_same_deltas(adapter, peft_deltas(model))


def test_the_live_scaling_counts():
    model = with_adapter(Net())
    model.base_model.model.layers[1].q_proj.scaling["default"] = -0.25
    (adapter,) = read_peft_model(model)
    assert [factors.scaling for factors in adapter.targets.values()] == [5 / 3, -0.25]
    model.base_model.model.layers[1].q_proj.scaling["default"] = float("nan")
    with pytest.raises(FormatError, match=r"layers.1.q_proj.scaling\['default'\]: expected a finite number"):
        read_peft_model(model)


def test_a_base_that_an_initialisation_changed_is_fine_live():
    assert read_peft_model(with_adapter(Net(), init_lora_weights="pissa"))[0].targets
    assert read_peft_model(with_adapter(Net(), init_lora_weights="mica"))[0].targets


def test_a_merged_adapter_is_refused():
    model = with_adapter(Net())
    model.merge_adapter()
    with pytest.raises(StateError, match=r"layers.0.q_proj: expected a pristine base .*\['default'\] merged"):
        read_peft_model(model)
    model.unmerge_adapter()
    assert read_peft_model(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["down"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed": [1, 2]}}, "trainable_token_indices"),
        ({"target_modules": [], "target_parameters": ["up.weight"]}, "target_parameters"),
        ({"target_modules": ["conv"]}, "conv.lora_A.default: .*convolution"),
    ],
)
def test_variants_in_a_model_are_refused(config, message):
    with pytest.raises(FormatError, match=message):
        read_peft_model(with_adapter(Net(), **config))


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ({"use_dora": True}, "use_dora", "q_proj: expected plain LoRA, got DoraLinearVariant in adapter 'default'"),
        ({"lora_bias": True}, "lora_bias", "q_proj: expected no lora_bias, got one in adapter 'default'"),
        ({"modules_to_save": ["down"]}, "modules_to_save", "down: expected LoRA only, got ModulesToSaveWrapper"),
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices", "embed: expected LoRA only, got TrainableTokensWrapper"),
        ({"target_modules": [], "target_parameters": ["up.weight"]}, "target_parameters", "up: .*got ParamWrapper"),
    ],
)
def test_the_layers_are_checked_too(config, field, message):
    """Where the configuration no longer says what the model does."""
    model = with_adapter(Net(), **config)
    setattr(model.peft_config["default"], field, None)
    with pytest.raises(FormatError, match=message):
        read_peft_model(model)


def test_nonfinite_factors_of_a_model_are_refused():
    model = with_adapter(Net())
    with torch.no_grad():
        model.base_model.model.layers[1].q_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match="layers.1.q_proj.lora_B.default: expected finite values, got 1"):
        read_peft_model(model)


def test_factors_without_storage_are_refused():
    model = with_adapter(Net())
    model.base_model.model.layers[0].q_proj.lora_A.to("meta")
    with pytest.raises(FormatError, match="layers.0.q_proj.lora_A.default: expected a dense tensor with storage, got .*meta"):
        read_peft_model(model)


def test_models_without_lora_are_refused():
    with pytest.raises(InvalidTypeError, match="expected a model with PEFT adapters .*got Net"):
        read_peft_model(Net())
    with pytest.raises(FormatError, match="default: peft_type: expected LORA, got 'LOHA'"):
        read_peft_model(peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["q_proj"])))
    model = with_adapter(Net())
    for block in model.base_model.model.layers:
        block.q_proj.delete_adapter("default")
    with pytest.raises(FormatError, match="default: expected LoRA factors on at least one module"):
        read_peft_model(model)


def test_attention_with_one_packed_parameter_is_refused():
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(FormatError, match="MultiheadAttention, which adapts a bare parameter"):
        read_peft_model(with_adapter(model, target_modules=["0"]))
