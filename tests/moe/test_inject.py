"""inject and eject: which linears, in which order, from which seed; and what is refused, with nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.errors import DeviceError, DtypeError, FusedMergeError, InvalidTypeError, InvalidValueError, ShapeError, StateError
from tests.moe.material import adapted, config, float64, tiny, tokens

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Backwards(nn.Module):
    """Registered in the reverse of the order in which it runs, with linears of several widths."""

    def __init__(self):
        super().__init__()
        self.third, self.second, self.first = nn.Linear(7, 3), nn.Linear(5, 7, bias=False), nn.Linear(6, 5)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def state(model):
    return {name: (id(module), module.training) for name, module in model.named_modules()} | {
        name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()
    }


def test_the_base_is_frozen_and_names_stay():
    base, model = tiny(), adapted()
    made = fm.moe.structure(model)
    assert list(made.linears)[:3] == [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    assert len(made.linears) == 14 and "lm_head.weight" not in made.linears
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith((".lora_A", ".lora_B")) or name == "lora_routers.router.weight" for name in trainable)
    assert len(trainable) == 2 * 14 + 1
    names = {fm.weights.canonical_name(name) for name in model.state_dict()}
    assert set(base.state_dict()) <= names
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, nn.Linear)


def test_eject_gives_the_very_model_back():
    for method in ("lora_switch", "moral", "mixlora", "pesc", "xlora"):
        model = tiny()
        model.model.embed_tokens.weight.requires_grad_(False)
        before = state(model)
        fm.moe.inject(model, config(method))
        assert state(model) != before
        fm.moe.eject(model)
        assert state(model) == before, method
        assert torch.equal(model(tokens()).logits, tiny()(tokens()).logits)
        with pytest.raises(StateError, match="structure"):
            fm.moe.structure(model)
        fm.moe.inject(model, config(method))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (("down_proj",), 2),
        ({"k_proj"}, 2),
        (["layers.1.mlp.up_proj"], 1),
        (["proj"], 0),
        (r".*\.1\.self_attn\.[qk]_proj", 2),
        (r"q_proj", 0),
        ("lm_head", 1),
    ],
)
def test_target_modules_are_pefts(targets, expected):
    """The same modules as PEFT adapts."""
    from peft import LoraConfig, get_peft_model

    def wrapped(modules):
        return sorted(name.removeprefix("base_model.model.") for name, module in modules if hasattr(module, "lora_A"))

    given = list(targets) if isinstance(targets, (set, tuple)) else targets
    if not expected:
        with pytest.raises(InvalidValueError, match="target_modules"):
            fm.moe.inject(tiny(), config(target_modules=targets))
        with pytest.raises(ValueError, match="not found"):
            get_peft_model(tiny(), LoraConfig(target_modules=given))
        return
    model = fm.moe.inject(tiny(), config(target_modules=targets))
    theirs = get_peft_model(tiny(), LoraConfig(target_modules=given))
    assert wrapped(model.named_modules()) == wrapped(theirs.named_modules())
    assert len(wrapped(model.named_modules())) == expected


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_static_lora_is_pefts(use_rslora):
    from peft import LoraConfig, get_peft_model

    ids = tokens()
    theirs = get_peft_model(tiny(), LoraConfig(r=3, lora_alpha=5, target_modules=list(LINEARS), use_rslora=use_rslora))
    ours = fm.moe.inject(tiny(), config("lora", r=3, lora_alpha=5, use_rslora=use_rslora))
    ranges = {"A": [], "B": []}
    with torch.no_grad():
        for name, part in fm.moe.structure(ours).linears.items():
            layer = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
            layer.lora_A["default"].weight.copy_(part.lora_A[0])
            layer.lora_B["default"].weight.copy_(part.lora_B[0])
            ranges["A"].append(float(part.lora_A.abs().max() * part.in_features**0.5))
            ranges["B"].append(float(part.lora_B.abs().max() * 3**0.5))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    for largest in ranges.values():  # nn.Linear's own uniform distribution, up to 1 / sqrt(columns)
        assert 0.9 < max(largest) <= 1


def test_initialisations():
    for init, a_std, b in ((True, 1 / 3**0.5 / 4, 0), ("gaussian", 1 / 3, 0), (False, 1 / 3**0.5 / 4, 1)):
        model = fm.moe.inject(
            tiny(), config(init_lora_weights=init, target_modules=["gate_proj", "up_proj"], num_experts=40, router_init_std=0.5)
        )
        for part in fm.moe.structure(model).linears.values():
            assert float(part.lora_A.std()) == pytest.approx(a_std, rel=0.08)
            assert bool(part.lora_B.abs().sum() > 0) is bool(b)
        assert float(fm.moe.structure(model).routers["router"].weight.std()) == pytest.approx(0.5, rel=0.1)


def test_a_seed_gives_the_same_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    untouched = torch.rand(3)
    for method in ("lora_switch", "mola", "mixlora", "pesc", "xlora", "moral"):
        torch.manual_seed(7)
        models = [fm.moe.inject(tiny(attention_dropout=0.5).train(), config(method), seed) for seed in (5, 5, 6)]
        assert torch.equal(torch.rand(3), untouched), method
        a, b, c = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in models)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not any(torch.equal(a[name], c[name]) for name in a)
    experts = next(iter(fm.moe.structure(models[0]).linears.values())).lora_A
    assert not torch.equal(experts[0], experts[1])


def test_num_experts_by_depth():
    model = fm.moe.inject(tiny(num_hidden_layers=4), config("mola", num_experts=[2, 3, 4, 5]))
    counts = [part.num_experts for part in fm.moe.structure(model).linears.values()]
    assert counts == [2] * 7 + [3] * 7 + [4] * 7 + [5] * 7
    model = fm.moe.inject(tiny(num_hidden_layers=4), config("mola", num_experts=[2, 4]))
    assert [part.num_experts for part in fm.moe.structure(model).linears.values()] == [2] * 14 + [4] * 14
    default = fm.moe.LoRAMoEConfig(method="mola")
    assert (default.num_experts, default.top_k, default.r, default.lora_alpha) == ((2, 4, 6, 8), 2, 8, 16.0)
    with pytest.raises(InvalidValueError, match="divides 3 layers"):
        fm.moe.inject(tiny(num_hidden_layers=3), config("mola", num_experts=[2, 4]))


@pytest.mark.parametrize("method", ["lora_switch", "mola", "molora", "lora", "loramoe"])
def test_any_modules_linears_in_the_order_in_which_they_run(method):
    torch.manual_seed(0)
    model = fm.moe.inject(Backwards(), config(method), 4)
    x = torch.randn(9, 6)
    y = model(x)
    made = fm.moe.structure(model)
    assert list(made.linears) == ["first.weight", "second.weight", "third.weight"]
    if method == "lora_switch":
        assert made.places == {"router": "first"} and made.routers["router"].in_features == 6
        ids, gates = made.routers["router"](x)
        for name in ("first", "second", "third"):
            x = made.linears[f"{name}.weight"].mixed(x, ids, gates)
            x = torch.tanh(x) if name != "third" else x
        assert torch.equal(y, x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_router_without_a_width_yet_is_trained_by_the_optimiser_that_holds_it():
    torch.manual_seed(0)
    model = fm.moe.inject(Backwards(), config(), 4)
    router = fm.moe.structure(model).routers["router"]
    assert router.in_features is None
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.inference_mode():
        model(torch.randn(9, 6))
    model(torch.randn(9, 6)).square().sum().backward()
    before = router.weight.detach().clone()
    assert not router.weight.is_inference()
    optimiser.step()
    assert not torch.equal(before, router.weight)


def test_a_model_whose_order_changes_is_noticed():
    model = fm.moe.inject(Backwards(), config(), 4)
    model(torch.randn(9, 6))
    model.forward = lambda x: model.second(torch.tanh(x))
    with pytest.raises(StateError, match="expected first to run first"):
        model(torch.randn(9, 5))


def test_a_linear_registered_twice_is_adapted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    model = fm.moe.inject(Twice(), config("lora"))
    assert model.one is model.two and len(fm.moe.structure(model).linears) == 1
    fm.moe.eject(model)
    assert type(model.one) is nn.Linear and model.one is model.two


def test_a_sequential_and_a_bias():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    weights = [float64(parameter) for parameter in model.parameters()]
    fm.moe.inject(model, config("lora"))
    x = torch.randn(3, 4)
    first, second = fm.moe.structure(model).linears.values()

    def lora(part, weight, bias, v):
        return v @ (weight + float64(part.scaling)[0] * float64(part.lora_B)[0] @ float64(part.lora_A)[0]).T + bias

    expected = lora(second, *weights[2:], np.tanh(lora(first, *weights[:2], float64(x))))
    np.testing.assert_allclose(float64(model(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_transformers_model_that_reads_no_tokens():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = fm.moe.inject(ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval(), config())
    made = fm.moe.structure(model)
    pixels = torch.randn(2, 3, 8, 8)
    with made.recording() as records:
        model(pixel_values=pixels)
    (place,) = made.places.values()
    assert ".0." in place
    assert records[0].ids.shape == (2, 5, 2)  # four patches and [CLS]
    with pytest.raises(StateError, match="token_table"):
        fm.moe.token_table(model)


def test_torchs_own_encoder_does_not_bypass_its_adapters():
    """In evaluation it would compute with the weights, and never call the linears."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
    fm.moe.inject(model, config("mola"))
    assert {name.split(".")[2] for name in fm.moe.structure(model).linears} == {"linear1", "linear2"}
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model(x, src_key_padding_mask=padding)
    kept = ~padding
    assert torch.equal(fast[kept], slow[kept]) and not torch.allclose(slow[kept], plain[kept], atol=0.05)
    fm.moe.eject(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], plain[kept])
        assert layer.activation_relu_or_gelu and model.use_nested_tensor
    with pytest.raises(InvalidTypeError, match="NonDynamicallyQuantizableLinear"):
        fm.moe.inject(model, config("mola", target_modules=["out_proj"]))


BAD_CONFIGS = [
    ({"method": "switch"}, InvalidValueError, "method"),
    ({"top_k": 9}, InvalidValueError, "top_k: expected at most num_experts"),
    ({"method": "mola", "num_experts": [2, 4], "top_k": 3}, InvalidValueError, "top_k"),
    ({"num_experts": [4, 2]}, InvalidValueError, "num_experts"),
    ({"num_experts": []}, InvalidValueError, "num_experts"),
    ({"num_experts": 2.0}, InvalidTypeError, "num_experts"),
    ({"top_k": 0}, InvalidValueError, "top_k"),
    ({"top_k": True}, InvalidTypeError, "top_k"),
    ({"r": 0}, InvalidValueError, "r"),
    ({"r": "8"}, InvalidTypeError, "r"),
    ({"lora_alpha": float("nan")}, InvalidValueError, "lora_alpha"),
    ({"lora_dropout": 1.0}, InvalidValueError, "lora_dropout"),
    ({"lora_dropout": -0.1}, InvalidValueError, "lora_dropout"),
    ({"init_lora_weights": "pissa"}, InvalidValueError, "init_lora_weights"),
    ({"gating": "hard"}, InvalidValueError, "gating"),
    ({"balance_loss": "entropy"}, InvalidValueError, "balance_loss"),
    ({"balance_loss_coef": "much"}, InvalidTypeError, "balance_loss_coef"),
    ({"z_loss_coef": float("inf")}, InvalidValueError, "z_loss_coef"),
    ({"router": "table", "method": "mola"}, InvalidValueError, "router"),
    ({"target_modules": []}, InvalidValueError, "target_modules"),
    ({"target_modules": [1]}, InvalidTypeError, "target_modules"),
    ({"target_modules": None}, InvalidTypeError, "target_modules"),
    ({"use_rslora": 1}, InvalidTypeError, "use_rslora"),
    ({"expert_names": ["a", "a"], "num_experts": 2}, InvalidValueError, "expert_names"),
    ({"expert_types": [0, 1], "num_experts": 2}, InvalidValueError, "expert_types"),
    ({"xlora": {"depth": 2}}, InvalidValueError, "xlora"),
]


@pytest.mark.parametrize(("fields", "error", "match"), BAD_CONFIGS)
def test_a_configuration_that_cannot_be_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        fm.moe.LoRAMoEConfig(**fields)


def quantised():
    class Params4bit(nn.Parameter):
        """bitsandbytes' is told by its name."""

    model = tiny()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = Params4bit(layer.weight.data, requires_grad=False)
    return model


def with_forward_of_its_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(nn.Linear(4, 4), Scaled(4, 4))


def peft_model():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))


BAD_MODELS = [
    (lambda: "a model", {}, InvalidTypeError, "model"),
    (lambda: nn.Linear(3, 3), {}, InvalidTypeError, "model"),
    (nn.Identity, {}, InvalidValueError, "the model has none"),
    (tiny, {"target_modules": ["c_attn"]}, InvalidValueError, r"names that match a linear \(down_proj, gate_proj"),
    (tiny, {"target_modules": ["embed_tokens"]}, InvalidTypeError, "Embedding"),
    (gpt2, {"target_modules": ["c_attn"]}, InvalidTypeError, "Conv1D"),
    (tiny, {"method": "mixlora", "target_modules": ["q_proj"]}, InvalidValueError, "linears of an MLP"),
    (tiny, {"method": "pesc", "target_modules": ["q_proj"]}, InvalidValueError, "match an MLP"),
    (Backwards, {"method": "pesc"}, InvalidValueError, "match an MLP"),
    (Backwards, {"method": "mixlora"}, InvalidValueError, "linears of an MLP"),
    (Backwards, {"method": "xlora"}, InvalidTypeError, "transformers model"),
    (Backwards, {"router": "table"}, InvalidTypeError, "nn.Embedding"),
    (tiny, {"method": "xlora", "xlora": {"width": 3}}, InvalidValueError, "xlora"),
    (adapted, {}, StateError, "eject"),
    (lambda: nn.Sequential(adapted()), {}, StateError, "no adapter wraps"),
    (peft_model, {}, StateError, "no adapter wraps"),
    (quantised, {}, DtypeError, "up_proj: expected a plain floating-point weight"),
    (lambda: tiny().to("meta"), {}, DeviceError, "meta"),
    (with_forward_of_its_own, {}, InvalidTypeError, "Scaled"),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {}, InvalidTypeError, "a weight of its own"),
]


@pytest.mark.parametrize(("make", "fields", "error", "match"), BAD_MODELS)
def test_a_model_that_cannot_be_adapted_is_refused_and_left_alone(make, fields, error, match):
    model = make()
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match) as caught:
        fm.moe.inject(model, config(**fields))
    assert isinstance(caught.value, FusedMergeError)
    if before is not None:
        assert state(model) == before
        assert not any(module._forward_pre_hooks for module in model.modules()) or make is adapted or match == "no adapter wraps"


def test_other_arguments():
    with pytest.raises(InvalidTypeError, match="config"):
        fm.moe.inject(tiny(), {"method": "lora"})
    with pytest.raises(InvalidTypeError, match="seed"):
        fm.moe.inject(tiny(), config(), seed="0")
    with pytest.raises(StateError, match="structure"):
        fm.moe.structure(tiny())


def test_tokens_that_do_not_match_the_routing():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.sample = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.sample(self.token(x).mean(1))

    model = fm.moe.inject(Pooled(), config())
    with pytest.raises(ShapeError, match=r"sample: expected the \[3, 5\] tokens that were routed, got \[3\]"):
        model(torch.randn(3, 5, 4))


def test_the_package_and_a_configuration_need_no_torch():
    import subprocess
    import sys

    code = "import sys, fusedmerge as fm; fm.moe.LoRAMoEConfig(); assert 'torch' not in sys.modules; print(fm.moe.inject.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "inject\n" and "structure" in dir(fm.moe)
    import fusedmerge.moe.inject
    import fusedmerge.moe.structure

    assert callable(fm.moe.inject) and callable(fm.moe.structure) and callable(fusedmerge.moe.inject)
