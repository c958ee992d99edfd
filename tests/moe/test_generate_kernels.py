"""generate's `fused` on the kernels: what goes to them, and weights, biases, ids and callers that must not."""

from __future__ import annotations

import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend
from fusedmerge.errors import DtypeError, InvalidValueError, ShapeError
from fusedmerge.moe import model_session
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.layers import MoELinear
from tests.moe.decoder_kit import make_experts, relative, write_model
from tests.moe.test_generate import forced, injected, truth


@pytest.fixture
def prompt():
    return torch.randint(0, 67, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path):
    return injected(tmp_path, dtype=torch.bfloat16)


def linears(model):
    return [part.base_layer for part in model.modules() if isinstance(part, MoELinear)]


def apart(vector):
    """The same values, two elements apart."""
    return torch.stack([vector, torch.full_like(vector, torch.nan)], dim=1)[:, 0]


def test_few_tokens_of_bfloat16_go_to_the_kernels_directly(tmp_path, prompt, monkeypatch):
    model, called = injected(tmp_path, dtype=torch.bfloat16), []
    plain = model_session.lora_linear
    monkeypatch.setattr(model_session, "lora_linear", lambda *given: (called.append(len(given[0])), plain(*given))[1])
    tokens = torch.cat([prompt, prompt], dim=1)  # a prompt of nine, and nine steps
    exact = truth(model, tokens)[:, 8:]
    found = forced(model, "fused", tokens, 9)
    assert not called
    monkeypatch.setattr(backend, "extension", lambda: None)
    by_torch = forced(model, "fused", tokens, 9)
    assert len(called) == 14 * 10
    rounding = relative(by_torch, exact).max()
    assert 0 < rounding < 0.05 and relative(found, exact).max() < 1.5 * rounding and relative(found, by_torch).max() < 2 * rounding


def test_a_strided_bias(model, prompt):
    for layer in linears(model):
        layer.bias = torch.nn.Parameter(torch.randn(len(layer.weight)).bfloat16(), requires_grad=False)
    expected = forced(model, "fused", prompt, 9)
    for layer in linears(model):
        layer.bias = torch.nn.Parameter(apart(layer.bias), requires_grad=False)
        assert layer.bias.stride() == (2,)
    assert torch.equal(forced(model, "fused", prompt, 9), expected)


def test_strided_biases_and_norms_of_a_decoder(tmp_path, prompt):
    write_model(tmp_path, dtype=torch.bfloat16, attention_bias=True)
    plain = Decoder.from_pretrained(tmp_path)
    experts = make_experts(plain)
    expected = Decoder(plain.config, plain.weights, experts).logits(prompt)
    for kind in ("bias", "norm.weight"):
        weights = {name: apart(weight) if name.endswith(kind) else weight for name, weight in plain.weights.items()}
        assert sum(weight.stride() == (2,) for weight in weights.values()) >= 5
        assert relative(Decoder(plain.config, weights, experts).logits(prompt), expected).max() < 0.03


class Wrapped(torch.Tensor):
    """A tensor around another one, as quantised weights are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        plain = torch.utils._pytree.tree_map(lambda each: each.inner if isinstance(each, Wrapped) else each, (args, kwargs or {}))
        result = function(*plain[0], **plain[1])
        return Wrapped(result) if function is torch.ops.aten.detach.default else result


def test_a_weight_without_an_address(model, prompt):
    expected = fm.moe.generate(model, prompt, 4, strategy="fused")
    for layer in linears(model):
        layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    assert torch.equal(fm.moe.generate(model, prompt, 4, strategy="fused"), expected)


def test_what_lora_linear_refuses_is_refused(model, prompt):
    with fm.moe.structure(model).forced(torch.tensor([[[1, 9]]]), torch.ones(1, 1, 2)), pytest.raises(InvalidValueError, match="ids"):
        fm.moe.generate(model, prompt, 2, strategy="fused")
    with torch.no_grad(), model_session.ModelSession(model, "fused") as session:
        session.prefill(prompt)
        part = next(part for part in model.modules() if isinstance(part, MoELinear))
        with pytest.raises(ShapeError, match="lora_linear"):
            session._fused(part, session.factors[part], torch.ones(1, 1, 3).bfloat16(), *part.route(torch.ones(1, 1, 32).bfloat16()))
    for layer in linears(model):
        layer.bias = torch.nn.Parameter(torch.zeros(len(layer.weight)), requires_grad=False)
    with pytest.raises(DtypeError, match="bias"):
        fm.moe.generate(model, prompt, 2, strategy="fused")


def test_inside_a_compiled_function(model, prompt):
    expected = fm.moe.generate(model, prompt, 4, strategy="merged")

    @torch.compile(backend="eager")
    def continued(tokens):
        return fm.moe.generate(model, tokens + 0, 4, strategy="merged")

    assert torch.equal(continued(prompt), expected)
    torch._dynamo.reset()
