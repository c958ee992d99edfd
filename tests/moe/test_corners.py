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
