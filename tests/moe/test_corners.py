"""Empty slots, tied weights, output layers, interrupted forwards: where a mixture could go wrong without a word."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.cost import Rates
from fusedmerge.errors import InvalidTypeError, InvalidValueError, ShapeError, StateError, UnknownNameError
from fusedmerge.moe import auto
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.routing import innermost
from tests.kit import bits
from tests.moe.material import adapted, config, gradients, tiny, tokens

ALL = ("unfused", "merged-simple", "merged", "fused")


def state(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("length", [3, 20])  # gathers; every expert over all tokens
@pytest.mark.parametrize("of", [lambda model: model, Decoder.from_model])
def test_tokens_before_any_control_token_have_no_experts(of, length):
    model = adapted(router="control", num_experts=2)
    fm.moe.structure(model).routers["router"].steers[:] = False
    ids = tokens(1, length)
    expected = fm.moe.generate(model, ids, 4, strategy="backbone")
    for strategy in ALL:
        assert torch.equal(fm.moe.generate(of(model), ids, 4, strategy=strategy), expected)


@pytest.mark.parametrize("length", [3, 20])
def test_a_forced_empty_slot_is_empty_whatever_its_gate(length):
    model, ids = adapted(), tokens(1, length)
    expected = fm.moe.generate(model, ids, 4, strategy="backbone")
    with fm.moe.structure(model).forced(torch.tensor([-1, -1]), torch.tensor([1.0, 2.0])):
        for strategy in ALL:
            assert torch.equal(fm.moe.generate(model, ids, 4, strategy=strategy), expected)


def test_mixlora_on_some_layers_only():
    model, ids = adapted("mixlora", target_modules=r".*layers\.1\..*_proj"), tokens(2, 5)
    for strategy in ("unfused", "fused"):
        torch.testing.assert_close(Decoder.from_model(model).logits(ids, strategy=strategy), model(ids).logits)


def shared_weight():
    model = tiny()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


TIED = {
    "a head that is the embedding": (lambda: tiny(tie_word_embeddings=True), ["q_proj", "lm_head"]),
    "two linears with one weight": (shared_weight, ["q_proj"]),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("strategy", ["merged", "merged-simple"])
def test_tied_weights_are_not_merged(case, strategy):
    make, targets = TIED[case]
    model = fm.moe.inject(make(), config("lora", target_modules=targets), 3)
    before = state(model)
    with pytest.raises(StateError, match="tied to or overlaps"):
        fm.moe.generate(model, tokens(1, 5), 8, strategy=strategy)
    assert state(model) == before


@pytest.mark.parametrize("case", TIED)
def test_auto_does_not_merge_what_cannot_be(case, monkeypatch):
    monkeypatch.setattr(auto, "measure_rates", lambda device: Rates(bytes_per_second=1e9, flops_per_second=1e15, launch_seconds=0.0))
    make, targets = TIED[case]
    model, ids = fm.moe.inject(make(), config("lora", target_modules=targets), 3), tokens(1, 5)
    assert auto.choose(fm.moe.inject(tiny(), config("lora", target_modules=targets), 3), ids, 1000) == "merged"
    assert auto.choose(model, ids, 1000) == "fused"
    assert fm.moe.generate(model, ids, 50).shape == (1, 55)


def test_the_decoder_refuses_experts_that_it_would_not_run():
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnknownNameError, match=r"lm_head\.weight"):
        Decoder.from_model(model)


def test_what_save_wrote_is_loaded_through_a_wrapper(tmp_path):
    class Wrapper(nn.Module):  # as DistributedDataParallel holds its model
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, other, ids = adapted(), adapted(seed=9), tokens()
    fm.moe.save(model, tmp_path)
    fm.moe.load(Wrapper(other), tmp_path)
    assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(StateError, match="eject it first"):
        fm.moe.inject(Wrapper(other), config())
