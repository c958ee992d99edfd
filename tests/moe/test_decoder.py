"""The reference decoder computes transformers' models, and refuses what it does not compute."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedmerge.errors import DtypeError, FormatError, FusedMergeError, InvalidValueError, MissingFileError, ShapeError, StateError
from fusedmerge.moe.decoder import Cache, Decoder
from fusedmerge.moe.decoder_files import DecoderConfig
from fusedmerge.moe.session import DecoderSession
from tests.moe.decoder_kit import forced, make_experts, relative, write_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("llama", {}),
    "llama, long waves stretched, biases": ("llama", {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama, linear positions, one key head, wide heads": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "mistral, window": ("mistral", {"sliding_window": 7, "num_key_value_heads": 4}),
    "mistral, no window": ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in one layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request, tmp_path_factory):
    kind, options = MODELS[request.param]
    directory = tmp_path_factory.mktemp("model")
    return write_model(directory, kind, **options), directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return write_model(directory, dtype=torch.bfloat16), directory


def random_tokens(batch, count, seed=0):
    return torch.randint(0, 67, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_transformers(saved):
    model, directory = saved
    tokens = random_tokens(3, 33)
    exact = model(tokens).logits
    for packed in (False, True):
        decoder = Decoder.from_pretrained(directory, packed=packed)
        assert relative(decoder.logits(tokens, strategy="backbone"), exact).max() < 5e-6
        assert relative(forced(decoder, "backbone", tokens, 9), exact[:, 8:]).max() < 5e-6  # past every window
    live = Decoder.from_model(model)
    assert relative(live.logits(tokens, strategy="backbone"), exact).max() < 5e-6
    assert all(live.weights[name].data_ptr() == weight.data_ptr() for name, weight in model.state_dict().items() if name in live.weights)


@torch.no_grad()
def test_padding_at_the_left_changes_nothing(saved):
    model, directory = saved
    tokens, mask = random_tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    for row, empty in enumerate((0, 4, 13)):
        mask[row, :empty] = 0
    decoder = Decoder.from_pretrained(directory)
    logits = decoder.logits(tokens, mask, strategy="backbone")
    for row, empty in enumerate((0, 4, 13)):
        assert relative(logits[row : row + 1, empty:], model(tokens[row : row + 1, empty:]).logits).max() < 5e-6
    with DecoderSession(decoder, "backbone", 3, 20) as session:
        session.prefill(tokens[:, :18], padding=20 - mask.sum(1))
        assert relative(session.step(tokens[:, 18])[:, None], logits[:, 18:19]).max() < 5e-6


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_transformers_is(llama):
    model, directory = llama
    tokens = random_tokens(4, 40)
    exact = type(model).from_pretrained(directory, dtype=torch.float64)(tokens).logits
    theirs = relative(model(tokens).logits, exact).mean()
    for packed in (False, True):
        decoder = Decoder.from_pretrained(directory, packed=packed)
        assert decoder.dtype == torch.bfloat16
        assert relative(decoder.logits(tokens, strategy="backbone"), exact).mean() < 1.2 * theirs
        assert relative(forced(decoder, "backbone", tokens, 7), exact[:, 6:]).mean() < 1.2 * theirs


def test_a_sharded_checkpoint_and_a_dtype(tmp_path, llama):
    model, directory = llama
    model.save_pretrained(str(tmp_path), max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    whole, sharded = Decoder.from_pretrained(directory), Decoder.from_pretrained(tmp_path)
    assert all(torch.equal(whole.weights[name], sharded.weights[name]) for name in whole.weights)
    tokens = random_tokens(1, 5)
    wide = Decoder.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.logits(tokens, strategy="backbone"), whole.to(torch.float32).logits(tokens, strategy="backbone"))


def test_older_configurations_mean_the_same(llama):
    """transformers 4 wrote rope_theta and rope_scaling, torch_dtype, and no layer_types."""
    config = json.loads((llama[1] / "config.json").read_text())
    plain = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype", "head_dim")}
    for old, new in (
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 5e5, **LLAMA3}),
    ):
        before, now = DecoderConfig.of({**plain, **old}), DecoderConfig.of({**config, "rope_parameters": new})
        assert torch.equal(before.inverse_frequencies(), now.inverse_frequencies())
        assert before.shapes() == now.shapes()
    qwen = {**plain, "model_type": "qwen2", "architectures": None, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert DecoderConfig.of(qwen).windows == (None, 4)
    assert DecoderConfig.of({**qwen, "use_sliding_window": False}).windows == (None, None)
    assert DecoderConfig.of({**plain, "sliding_window": 4}).windows == (None, None)  # Llama knows none


def test_packed_weights_are_slices_of_one_matrix(llama):
    decoder = Decoder.from_pretrained(llama[1], packed=True)
    names = decoder.names[1]
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        slices = [decoder.weights[names[part]] for part in parts]
        assert len({tensor.untyped_storage().data_ptr() for tensor in slices}) == 1
        assert torch.equal(decoder.packed[names[parts[0]]][0], torch.cat(slices))


# ---------------------------------------------------------------------- refusals


def edit_config(directory, to, **changes):
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize(
    ("changes", "field", "got"),
    [
        ({"model_type": "gpt2"}, "model_type", "'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "Sequence"),
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type", "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor", "None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor", "0.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
        ({"num_hidden_layers": 3}, "checkpoint", "no model.layers.2"),
        ({"num_hidden_layers": 1}, "checkpoint", "model.layers.1"),
        ({"attention_bias": True}, "checkpoint", "q_proj.bias"),
        ({"intermediate_size": 55}, "mlp", "[56, 32]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "config.json", "quantization_config"),
    ],
)
def test_configurations_that_are_refused(llama, tmp_path, changes, field, got):
    with pytest.raises(FusedMergeError) as raised:
        Decoder.from_pretrained(edit_config(llama[1], tmp_path / "model", **changes))
    assert isinstance(raised.value, FormatError | ShapeError)
    assert raised.value.operation == "Decoder"
    assert field in raised.value.field
    assert got in str(raised.value)


def test_checkpoints_that_are_refused(llama, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(llama[1], directory)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, expected in (
        ({key: value for key, value in tensors.items() if key != name}, f"no {name}"),
        ({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "got model.layers.0.self_attn.q_norm.weight"),
        ({**tensors, name: tensors[name].to(torch.int8)}, "expected floats"),
    ):
        save_file({key: value.contiguous() for key, value in changed.items()}, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(FormatError, match="Decoder: ") as raised:
            Decoder.from_pretrained(directory)
        assert expected in str(raised.value)
    (directory / "model.safetensors").write_bytes((llama[1] / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        Decoder.from_pretrained(directory)
    with pytest.raises(MissingFileError, match="Decoder"):
        Decoder.from_pretrained(tmp_path / "nowhere")


def test_tokens_and_strategies_that_are_refused(llama):
    decoder, tokens = Decoder.from_pretrained(llama[1]), random_tokens(2, 4)
    for wrong, error in (
        (tokens.float(), DtypeError), (tokens[0], ShapeError), (tokens[:, :0], ShapeError), (tokens + 67, InvalidValueError),
        (tokens - 67, InvalidValueError), ([[1]], TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="logits: input_ids"):
            decoder.logits(wrong, strategy="backbone")
    for mask in ([[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 0, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 2, 1, 1], [1, 1, 1, 1]]):
        with pytest.raises(InvalidValueError, match="padding at the left"):
            decoder.logits(tokens, torch.tensor(mask), strategy="backbone")
    with pytest.raises(ShapeError, match="attention_mask"):
        decoder.logits(tokens, torch.ones(2, 5, dtype=torch.int64), strategy="backbone")
    with pytest.raises(InvalidValueError, match="strategy"):
        decoder.logits(tokens, strategy="merged")
    with pytest.raises(StateError, match="a plain backbone"):
        decoder.logits(tokens, strategy="fused")


def test_experts_that_do_not_fit_are_refused(llama):
    decoder = Decoder.from_pretrained(llama[1])
    wide = decoder.to(torch.float32)
    wide.experts = make_experts(wide)
    with pytest.raises(DtypeError, match="a of model.layers.0.self_attn.q_proj.weight"):
        Decoder(decoder.config, decoder.weights, wide.experts)
    experts = make_experts(decoder)
    name = decoder.names[0]["up_proj"]
    narrow = {**experts.linears, name: experts.linears[decoder.names[0]["q_proj"]]}
    with pytest.raises(ShapeError, match="b of model.layers.0.mlp.up_proj.weight"):
        Decoder(decoder.config, decoder.weights, type(experts)("lora_switch", narrow, experts.routers))
    with pytest.raises(KeyError, match="router of"):
        type(experts)("lora_switch", experts.linears, {})
    with pytest.raises(InvalidValueError, match="others run through transformers"):
        type(experts)("pesc", {}, {})


def test_a_session_ends_with_its_cache(llama):
    decoder, tokens = Decoder.from_pretrained(llama[1]), random_tokens(1, 4)
    session = DecoderSession(decoder, "backbone", 1, 5)
    with pytest.raises(StateError, match="at most 5 positions"):
        session.prefill(random_tokens(1, 6))
    first = session.prefill(tokens)
    session.step(tokens[:, 0])
    with pytest.raises(StateError, match="at most 5 positions"):
        session.step(tokens[:, 0])
    assert torch.equal(session.prefill(tokens), first)  # anew
    assert Cache(decoder, 2, 7).capacity == 7
