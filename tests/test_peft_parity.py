"""Against PEFT itself: adapters that PEFT made, in models that transformers made, must merge to the logits that PEFT's own merge gives."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fusedmerge as fm

TOKENS = torch.arange(24).view(2, 12)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=32)).to(dtype).eval()


MODELS = {
    "llama": (llama(), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2(), ["c_attn", "c_proj", "c_fc"]),  # Conv1D: weights stored as [in, out], c_proj of attention square
}


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.double()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def randomise(peft_model, seed):
    """Signed normal factors everywhere (PEFT starts B at zero), with deltas about half as large as the weights whatever the scaling."""
    generator = torch.Generator().manual_seed(seed)
    for layer in peft_model.modules():
        for name, scaling in layer.scaling.items() if hasattr(layer, "lora_A") else ():
            a, b = layer.lora_A, layer.lora_B
            if name not in a:
                a, b = layer.lora_embedding_A, layer.lora_embedding_B
            for factor, size in ((a[name], 0.1), (b[name], 0.1 / (abs(scaling) * layer.r[name] ** 0.5))):
                parameter = getattr(factor, "weight", factor)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


@st.composite
def configurations(draw):
    kind = draw(st.sampled_from(sorted(MODELS)))
    modules = draw(st.lists(st.sampled_from(MODELS[kind][1]), min_size=1, unique=True))
    pattern = st.dictionaries(st.sampled_from([*modules, f"0.*{modules[0]}"]), st.integers(1, 64), max_size=2)
    pattern = pattern.map(lambda d: dict(sorted(d.items())))  # as PEFT saves them: the first that fits counts
    options = {
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(1, 64)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(pattern),
        "alpha_pattern": draw(pattern),
        "target_modules": modules,
        "fan_in_fan_out": kind == "gpt2",
    }
    if draw(st.booleans()):
        options["layers_to_transform"] = [1]
        options["layers_pattern"] = {"llama": "layers", "gpt2": "h"}[kind]
    return kind, options, draw(st.integers(0, 1000))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configurations())
def test_merged_logits_equal_peft_s(tmp_path_factory, configuration):
    kind, options, seed = configuration
    directory = tmp_path_factory.mktemp("adapter")
    model = copy.deepcopy(MODELS[kind][0])
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    randomise(peft_model, seed)
    peft_model.save_pretrained(directory)
    bank = fm.AdapterBank.from_peft([directory], model)
    switcher = fm.Switcher(model, bank)
    before = logits(model)
    switcher.switch(directory.name)
    expected = logits(peft_model.merge_and_unload())
    assert relative(expected, before) > 1e-4  # the adapter does something
    assert relative(logits(model), expected) < 1e-5
    switcher.restore()
    assert torch.equal(logits(model), before)


@pytest.fixture
def two_adapters():
    """A PeftModel with two live adapters of different rank and targets."""
    peft_model = get_peft_model(llama(), LoraConfig(r=5, lora_alpha=9, target_modules=["q_proj", "down_proj"]), adapter_name="math")
    peft_model.add_adapter("code", LoraConfig(r=12, use_rslora=True, target_modules=["q_proj", "v_proj"]))
    randomise(peft_model, 3)
    return peft_model.eval()


def test_a_mixture_of_live_adapters_equals_peft_s(two_adapters):
    bank = fm.AdapterBank.from_model(two_adapters)
    assert bank.names == ("math", "code")
    model = llama()
    with fm.Switcher(model, bank).switched(["math", "code"]):
        ours = logits(model)
    two_adapters.base_model.set_adapter(["math", "code"])
    assert relative(ours, logits(two_adapters)) < 1e-5
    two_adapters.base_model.merge_adapter(["math", "code"])
    assert relative(ours, logits(two_adapters)) < 1e-5


def test_switching_inside_a_peft_model_warns_until_its_own_adapters_are_off(two_adapters):
    bank = fm.AdapterBank.from_model(two_adapters)
    with pytest.warns(UserWarning, match="disable_adapter_layers"):
        fm.Switcher(two_adapters, bank)
    two_adapters.base_model.disable_adapter_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        switcher = fm.Switcher(two_adapters, bank)
    before = logits(two_adapters)
    switcher.switch("math")
    ours = logits(two_adapters)
    switcher.restore()
    assert torch.equal(logits(two_adapters), before)
    two_adapters.base_model.enable_adapter_layers()
    two_adapters.set_adapter("math")
    assert relative(ours, logits(two_adapters)) < 1e-5


def test_a_live_merged_model_is_saved_by_its_own_save_pretrained(two_adapters, tmp_path):
    model = llama(torch.bfloat16)
    bank = fm.AdapterBank.from_peft(_saved(two_adapters, tmp_path), model)
    assert all(0 < error < 4e-3 for error in bank.cast_error.values())
    switcher = fm.Switcher(model, bank)
    with switcher.switched({"math": 0.7, "code": 0.3}):
        model.save_pretrained(tmp_path / "merged")
        merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())


def _saved(peft_model, path):
    peft_model.save_pretrained(path)
    return [path / "math", path / "code"]


def test_embeddings_merge_as_peft_merges_them(tmp_path):
    model = llama()
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"]))
    randomise(peft_model, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(tmp_path / "embed")
    fm.Switcher(model, fm.AdapterBank.from_peft([tmp_path / "embed"], model)).switch("embed")
    assert relative(logits(model), logits(peft_model.merge_and_unload())) < 1e-5


def test_a_reloaded_adapter_gives_the_same_bank(two_adapters, tmp_path):
    paths = _saved(two_adapters, tmp_path)
    again = PeftModel.from_pretrained(llama(), paths[0], adapter_name="math")
    again.load_adapter(paths[1], adapter_name="code")
    one, two = fm.AdapterBank.from_model(again), fm.AdapterBank.from_peft(paths, llama())
    assert one.targets == two.targets and one.names == two.names
    for name in one.targets:
        assert torch.equal(one.target(name).a, two.target(name).a) and torch.equal(one.target(name).b, two.target(name).b)
        assert torch.equal(one.target(name).scaling, two.target(name).scaling)
