"""Every method's forward equals its paper's formula, worked out in NumPy float64 (reference.py), and its gradients are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fusedmerge as fm
from tests.moe.material import adapted, backbone, config, float64, tiny, tokens, truth
from tests.moe.reference import Plain

GATINGS = ("softmax_of_topk", "topk_of_softmax", "topk_of_softmax_renormalized")
CASES = {
    "lora_switch": {"top_k": 2},
    "lora_switch, k=1": {"top_k": 1},
    "lora_switch, k=N": {"top_k": 4},
    "lora_switch, softmax then top-k": {"gating": "topk_of_softmax"},
    "lora_switch, renormalised": {"gating": "topk_of_softmax_renormalized", "top_k": 3},
    "lora_switch, rslora": {"use_rslora": True},
    "lora_switch, o_proj and down_proj": {"target_modules": ["o_proj", "down_proj"]},
    "lora_switch, one layer by pattern": {"target_modules": r".*layers\.1\..*(k_proj|up_proj)"},
    "mola": {"num_experts": [2, 4], "top_k": 2},
    "moral": {},
    "moral, k=1": {"top_k": 1, "target_modules": ["v_proj", "up_proj", "down_proj"]},
    "pesc": {},
    "mixlora": {},
    "mixlora, k=3, down_proj only": {"top_k": 3, "target_modules": ["q_proj", "down_proj"]},
    "mixlora, gate_proj only": {"target_modules": ["gate_proj"]},
    "loramoe": {},
    "molora": {},
    "molora, top-k": {"top_k": 2},
    "xlora": {},
    "xlora, top-k, deep": {"top_k": 2, "xlora": {"depth": 3, "size": 12, "temperature": 0.2}},
    "xlora, layerwise": {"xlora": {"layerwise": True, "temperature": 0.2}},
    "lora": {},
}


def model_for(case, family="Llama", dtype=torch.float32):
    return adapted(case.partition(",")[0], family, dtype, **CASES[case])


def assert_equal(got, expected, tolerance):
    error = np.abs(float64(got) - expected).max() / np.abs(expected).max()
    assert error < tolerance, error


@pytest.mark.parametrize("case", CASES)
def test_a_method_is_its_formula(case):
    base, model, ids = tiny(), model_for(case), tokens()
    expected = truth(base, model, ids)
    plain = np.stack([backbone(base).logits(row, Plain()) for row in ids.numpy()])
    assert np.abs(expected - plain).max() > 0.05 * np.abs(plain).max(), "experts too weak to be seen"
    assert_equal(model(ids).logits, expected, 1e-5)
    assert_equal(model.double()(ids).logits, expected, 1e-6)  # transformers computes norms and rotary angles in float32 even so


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_lora_switch_on_other_families(family):
    base, model, ids = tiny(family), model_for("lora_switch", family), tokens()
    assert_equal(model(ids).logits, truth(base, model, ids), 1e-5)


def test_an_untrained_model_is_the_backbone():
    base, ids = tiny(), tokens()
    for method in ("lora_switch", "mola", "moral", "pesc", "loramoe", "molora", "xlora", "lora"):
        model = fm.moe.inject(tiny(), config(method, init_lora_weights=True))
        assert torch.equal(model(ids).logits, base(ids).logits), method
    model = fm.moe.inject(tiny(), config("mixlora", init_lora_weights=True))
    torch.testing.assert_close(model(ids).logits, base(ids).logits)  # its gates multiply, and sum to 1 within rounding only


@pytest.mark.parametrize(
    "case", ["lora_switch", "lora_switch, k=1", "mola", "moral", "pesc", "mixlora", "loramoe", "molora", "xlora", "lora"]
)
def test_gradients_through_router_and_experts(case):
    ids = tokens(1, 4)
    model = adapted(case.partition(",")[0], dtype=torch.float64, **CASES[case] | {"r": 2, "z_loss_coef": 0.1})
    model.set_attn_implementation("sdpa")  # the eager one has its softmax in float32
    for name, _module in list(model.named_modules()):
        if name.endswith("norm"):  # transformers' own computes in float32
            model.set_submodule(name, torch.nn.RMSNorm(16, dtype=torch.float64).requires_grad_(False))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lora_A", "lora_B"} <= {name.rpartition(".")[2] for name in parameters}

    def loss(flat):  # all parameters as one vector
        parts = torch.split(flat, [parameter.numel() for parameter in parameters.values()])
        given = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        logits = torch.func.functional_call(model, given, (ids,)).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) + fm.moe.aux_loss(model)

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()]).requires_grad_()
    (grad,) = torch.autograd.grad(loss(flat), flat)
    parts = torch.split(grad, [parameter.numel() for parameter in parameters.values()])
    assert not [name for name, part in zip(parameters, parts, strict=True) if not part.abs().sum() > 0]
    torch.autograd.gradcheck(loss, flat, fast_mode=True, atol=1e-8, rtol=1e-6)


def test_the_key_value_cache_changes_nothing():
    ids = tokens(2, 6)
    for method in ("lora_switch", "mola", "moral", "pesc", "mixlora", "xlora"):
        model = adapted(method)
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :4], use_cache=True)
        rest = [first.logits]
        for t in (4, 5):
            rest.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(rest, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora_switch", "mola", "xlora"])
def test_transformers_own_generate(method):
    model, ids = adapted(method), tokens(2, 4)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_dropout_is_the_experts_only_and_only_in_training():
    ids = tokens()
    for method in ("lora_switch", "pesc", "mixlora"):
        model = adapted(method, lora_dropout=0.5)
        plain = adapted(method)(ids).logits
        assert torch.equal(model(ids).logits, plain)
        torch.manual_seed(0)
        first, second = model.train()(ids).logits, model(ids).logits
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)
        zero = adapted(method, lora_dropout=0.5, init_lora_weights=True).train()
        torch.testing.assert_close(zero(ids).logits, tiny()(ids).logits)


def test_dropout_keeps_the_expectation():
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    model = fm.moe.inject(linear, config("lora", lora_dropout=0.25), 0)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    torch.manual_seed(0)
    mean = model.train()(x.expand(40000, 8)).mean(0)
    spread = model(x.expand(40000, 8)).std(0) / 200
    assert ((mean - expected[0]).abs() < 5 * spread).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_float32_factors(dtype):
    ids = tokens()
    for method in ("lora_switch", "mola", "pesc", "mixlora"):
        model = fm.moe.inject(tiny(dtype=dtype), config(method), 3)
        made = fm.moe.structure(model)
        assert {p.dtype for part in made.parts.values() for p in (part.lora_A, part.lora_B)} == {torch.float32}
        twin = fm.moe.inject(tiny(dtype=dtype).float(), config(method), 3)
        wide, narrow = twin(ids).logits, model(ids).logits
        assert narrow.dtype == dtype
        error = (narrow.float() - wide).abs().mean() / wide.abs().mean()
        assert error < 8 * torch.finfo(dtype).eps, error


def test_autocast_computes_in_its_dtype_and_routes_in_float32():
    ids, model = tokens(), adapted()
    made = fm.moe.structure(model)
    with made.recording() as wide:
        expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16), made.recording() as narrow:
        output = model(ids, labels=ids)
    assert narrow[0].logits.dtype == narrow[0].gates.dtype == torch.float32
    assert torch.equal(narrow[0].ids, wide[0].ids)  # the embedding is not narrowed before the first linear
    assert torch.equal(narrow[0].gates, wide[0].gates)
    assert 1e-6 < (output.logits.float() - expected).abs().mean() / expected.abs().mean() < 0.05
    output.loss.backward()
    assert made.routers["router"].weight.grad.abs().sum() > 0
    assert made.routers["router"].weight.grad.dtype == torch.float32


def test_scaling_stays_float32_whatever_the_model_becomes():
    model = adapted(lora_alpha=1.0, r=3)
    part = next(iter(fm.moe.structure(model).linears.values()))
    exact = part.scaling.clone()
    assert exact[0] == np.float32(1 / 3)
    for change in (model.bfloat16, model.half, model.double, model.float):
        change()
        assert part.scaling.dtype == torch.float32 and torch.equal(part.scaling, exact)
