"""Empty slots, tied weights, output layers, interrupted forwards: where a mixture could go wrong without a word."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.cost import Rates
from fusedmerge.errors import InvalidTypeError, ShapeError, StateError, UnknownNameError
from fusedmerge.moe import auto
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.routing import innermost
from tests.kit import bits
from tests.moe.material import adapted, config, tiny, tokens

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


@pytest.mark.parametrize("method", ["lora_switch", "xlora"])
def test_an_adapted_output_layer_sees_the_last_tokens_only(method):
    """transformers gives its output layer one token of a prompt (logits_to_keep=1) in generate."""
    model, ids = adapted(method, target_modules=["q_proj", "lm_head"]), tokens(2, 6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for strategy in ("unfused", "fused"):
        assert torch.equal(fm.moe.generate(model, ids, 6, strategy=strategy), expected)
    one, alone = ids[:1], fm.moe.generate(model, ids[:1], 6, strategy="fused")
    for strategy in ("merged", "merged-simple") if method == "lora_switch" else ():
        assert torch.equal(fm.moe.generate(model, one, 6, strategy=strategy), alone)


def test_an_interrupted_forward_is_over_when_the_next_begins():
    model, ids = adapted(), tokens()
    expected = model(ids).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    for _ in range(2):
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
    assert torch.equal(model(ids).logits, expected)
    assert innermost() is None


def test_arguments_by_position_count_as_those_by_name():
    model, ids = adapted(balance_loss_coef=0.5), tokens(2, 8)
    mask = (torch.arange(8) >= torch.tensor([4, 1])[:, None]).long()
    named = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    assert torch.equal(model(ids, mask, labels=ids).loss, named)
    assert not torch.equal(model(ids, torch.ones_like(mask), labels=ids).loss, named)


class Turned(nn.Module):
    """[B, T] in its first linear, [T, B] in its second."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x).transpose(0, 1))


class Widened(nn.Module):
    """One token in its first linear, three in its second."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x[:, :1]) + x)


@pytest.mark.parametrize("kind", [Turned, Widened])
def test_other_tokens_than_those_that_were_routed_are_refused(kind):
    model = fm.moe.inject(kind(), config(num_experts=3))
    with pytest.raises(ShapeError, match="that were routed"):
        model(torch.randn(2, 3, 4))
    with fm.moe.structure(model).forced(torch.tensor([1]), torch.tensor([0.5])):  # one choice, for whatever comes
        assert torch.isfinite(model(torch.randn(2, 3, 4))).all()


def test_a_sequential_with_a_shared_router_and_its_state_before_any_forward():
    def make(seed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        return fm.moe.inject(plain, config(num_experts=3), seed)

    model, other, x = make(0), make(1), torch.randn(5, 4)
    y = model(x)
    (first, second), (ids, gates) = fm.moe.structure(model).linears.values(), fm.moe.structure(model).routers["router"](x)
    torch.testing.assert_close(y, second.mixed(torch.tanh(first.mixed(x, ids, gates)), ids, gates))
    held = list(other.parameters())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    assert all(mine is before for mine, before in zip(other.parameters(), held, strict=True))


def test_the_first_pass_of_one_thread_does_not_strip_another():
    model, ids = adapted("xlora", xlora={"temperature": 0.2}), tokens()
    model.config.use_cache = False
    expected, started, go = model(ids).logits, threading.Event(), threading.Event()
    first = next(iter(fm.moe.structure(model).linears.values()))
    worker = threading.Thread(target=lambda: model(ids))

    def pause(*_):
        if threading.current_thread() is worker and not started.is_set():  # in its first pass
            started.set()
            go.wait(20)

    handle = first.register_forward_pre_hook(pause)
    worker.start()
    assert started.wait(20)
    found = model(ids).logits
    go.set()
    worker.join()
    handle.remove()
    assert torch.equal(found, expected)


def test_the_balance_loss_is_added_to_a_loss_in_a_dict():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, labels=None):
            return {"loss": (self.a(x) - labels).square().mean()}

    model, x = fm.moe.inject(Model(), config(num_experts=3, balance_loss_coef=0.5)), torch.randn(5, 4)
    (first,), routes = fm.moe.structure(model).linears.values(), model(x, labels=x) and fm.moe.structure(model).routers["router"](x)
    own = (first.mixed(x, *routes) - x).square().mean()
    torch.testing.assert_close(model(x, labels=x)["loss"], own + fm.moe.aux_loss(model))
    assert fm.moe.aux_loss(model) > 0.4


def test_duplicates_in_a_table_add():
    factors = {"model.layers.0.self_attn.q_proj.weight": (torch.randn(2, 3, 16), torch.randn(2, 16, 3))}
    bank = fm.AdapterBank.from_tensors(factors, torch.ones(2), ["a", "b"])
    model = fm.moe.compose(tiny(), bank, table={7: ["a", "b", "a"], 8: {"b": 0.5, 1: 0.25}})
    router = fm.moe.structure(model).routers["router"]
    assert router.ids[7:9].tolist() == [[0, 1], [1, -1]]
    assert router.gates[7:9].tolist() == [[2.0, 1.0], [0.75, 0.0]]


def test_eject_gives_transformers_its_own_checkpointing_back():
    model = tiny()
    model.gradient_checkpointing_enable()
    layers = [module for module in model.modules() if "_gradient_checkpointing_func" in module.__dict__]
    before = [layer._gradient_checkpointing_func for layer in layers]
    fm.moe.inject(model, config())
    model.train()(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(layer._gradient_checkpointing_func is not function for layer, function in zip(layers, before, strict=True))
    fm.moe.eject(model)
    assert all(layer._gradient_checkpointing_func is function for layer, function in zip(layers, before, strict=True))


def test_a_path_is_a_path():
    with pytest.raises(InvalidTypeError, match="directory"):
        Decoder.from_pretrained(3)


@pytest.mark.parametrize("of", [lambda model: model, Decoder.from_model])
def test_padding_does_not_steer(of):
    model = adapted(router="control")
    steers = fm.moe.structure(model).routers["router"].steers
    steers[:] = False
    steers[0] = True
    ids = tokens(2, 7).clamp_min(1)
    ids[1, :4] = 0  # padding, by a token that steers elsewhere
    ids[0, 2] = 0
    mask = (torch.arange(7) >= torch.tensor([0, 4])[:, None]).long()
    for strategy in ("unfused", "fused"):
        together = fm.moe.generate(of(model), ids, 6, strategy=strategy, attention_mask=mask)
        for row in range(2):
            alone = fm.moe.generate(of(model), ids[row : row + 1, mask[row].bool()], 6, strategy=strategy)
            assert torch.equal(together[row, -6:], alone[0, -6:])
