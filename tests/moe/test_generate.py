"""generate: for injected transformers models and for the decoder, by every strategy, with everything put back afterwards."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedmerge as fm
from fusedmerge.cost import Rates
from fusedmerge.errors import DtypeError, InvalidTypeError, InvalidValueError, ShapeError, StateError
from fusedmerge.moe import auto
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.model_session import ModelSession
from fusedmerge.moe.session import DecoderSession
from tests.kit import bits
from tests.moe.decoder_kit import relative, write_model

ALL = ("unfused", "merged-simple", "merged", "fused")
METHODS = {
    "lora_switch": ALL,
    "lora": ALL,
    "mola": ("unfused", "merged-simple", "fused"),
    "moral": ("unfused", "merged-simple", "fused"),
    "molora": ("unfused", "merged-simple", "fused"),
    "loramoe": ("unfused", "merged-simple", "fused"),
    "mixlora": ("unfused", "fused"),
    "pesc": ("unfused", "fused"),
    "xlora": ("unfused", "fused"),
}


def injected(directory, method="lora_switch", kind="llama", dtype=torch.float32, **options):
    """A model with random experts that matter, and a router with clear preferences."""
    model = write_model(directory, kind, dtype=dtype)
    given = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, "router_init_std": 0.3, **options}
    if method != "lora":
        given.setdefault("num_experts", 4)
    return fm.moe.inject(model, fm.moe.LoRAMoEConfig(method=method, **given))


@pytest.fixture(scope="module", params=list(METHODS))
def model(request, tmp_path_factory):
    return injected(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def switch(tmp_path):
    return injected(tmp_path)


@pytest.fixture
def prompt():
    return torch.randint(0, 67, (1, 9), generator=torch.Generator().manual_seed(0))


def state(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def truth(model, tokens):
    """Logits of whole sequences in float64, from the model's own forward (which other tests hold to NumPy)."""
    return copy.deepcopy(model).double()(tokens).logits


def forced(model, strategy, tokens, prompt):
    """The logits after the prompt, and after each given token."""
    with torch.no_grad(), ModelSession(model, strategy) as session:
        found = [session.prefill(tokens[:, :prompt])]
        found += [session.step(tokens[:, t]) for t in range(prompt, tokens.shape[1])]
    return torch.stack(found, dim=1)


def test_every_strategy_gives_the_models_own_logits(model, prompt):
    tokens = torch.cat([prompt, torch.randint(0, 67, (1, 25), generator=torch.Generator().manual_seed(1))], dim=1)
    before, exact = state(model), truth(model, tokens)[:, 8:]
    plain = forced(model, "backbone", tokens, 9)
    assert relative(plain, exact).min() > 0.02  # the experts matter
    for strategy in METHODS[fm.moe.structure(model).config.method]:
        assert relative(forced(model, strategy, tokens, 9), exact).max() < 1e-5
        assert state(model) == before


def test_greedy_tokens_are_those_of_transformers(model, prompt):
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    for strategy in ("auto", METHODS[fm.moe.structure(model).config.method][0]):
        tokens = fm.moe.generate(model, prompt, 20, strategy=strategy)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, expected)


def test_the_decoder_over_the_models_own_weights(model, prompt, tmp_path):
    method = fm.moe.structure(model).config.method
    if method not in ("lora_switch", "lora", "mola", "mixlora"):
        with pytest.raises(InvalidValueError, match="others run through transformers"):
            Decoder.from_model(model)
        return
    before, expected = state(model), fm.moe.generate(model, prompt, 20)
    for packed in (False, True):
        decoder = Decoder.from_model(model, packed=packed)
        assert relative(decoder.logits(expected), truth(model, expected)).max() < 1e-5
        for strategy in ("auto", METHODS[method][packed]):
            assert torch.equal(fm.moe.generate(decoder, prompt, 20, strategy=strategy), expected)
            assert state(model) == before
    fm.moe.save(model, tmp_path / "experts")
    fm.moe.eject(copy.deepcopy(model)).save_pretrained(tmp_path / "base")
    loaded = Decoder.from_pretrained(tmp_path / "base", experts=tmp_path / "experts")
    assert relative(loaded.logits(expected), Decoder.from_model(model).logits(expected).double()).max() < 1e-6


def test_a_table_of_experts_by_token(tmp_path, prompt):
    """Routes that are known before the forward, some of them of fewer experts or none."""
    model = injected(tmp_path, router="table")
    table = fm.moe.structure(model).routers["router"]
    table.ids[::3, 1] = -1
    table.ids[::5] = -1
    table.gates.uniform_(0.2, 1.0, generator=torch.Generator().manual_seed(3))
    tokens = torch.cat([prompt, torch.arange(25)[None]], dim=1)
    exact = truth(model, tokens)[:, 8:]
    decoder = Decoder.from_model(model)
    assert relative(decoder.logits(tokens)[:, 8:], exact).max() < 1e-5
    assert relative(decoder.logits(tokens, strategy="unfused")[:, 8:], exact).max() < 1e-5
    expected = fm.moe.generate(model, prompt, 20)
    for strategy in ALL:
        assert relative(forced(model, strategy, tokens, 9), exact).max() < 1e-5
        assert torch.equal(fm.moe.generate(decoder, prompt, 20, strategy=strategy), expected)


def test_control_tokens_hold(tmp_path, prompt):
    """A token of the table decides for those that follow it, from the prompt into the generation and within it."""
    model = injected(tmp_path, router="table")
    table = fm.moe.structure(model).routers["router"]
    table.holds = True
    table.steers[:] = False
    for token, ids in ((51, [2, 0]), (5, [1, -1]), (7, [-1, -1])):
        table.steers[token] = True
        table.ids[token] = torch.tensor(ids)
    tokens = torch.cat([prompt, torch.tensor([[1, 2, 5, 3, 4, 9, 7, 8, 51, 10, 11]])], dim=1)
    assert 51 in prompt
    exact = truth(model, tokens)[:, 8:]
    for strategy in ALL:
        assert relative(forced(model, strategy, tokens, 9), exact).max() < 1e-5
        decoder = Decoder.from_model(model)
        assert relative(decoder.logits(tokens)[:, 8:], exact).max() < 1e-5
        with DecoderSession(decoder, strategy, 1, 20) as session:
            for _ in range(2):  # the second time in the same buffers
                found = [session.prefill(tokens[:, :9])] + [session.step(tokens[:, t]).clone() for t in range(9, 20)]
                assert relative(torch.stack(found, dim=1), exact).max() < 1e-5


def test_auto_merges_what_lives_long_enough(tmp_path, prompt, monkeypatch):
    """With given rates: a switch costs 2 bytes(weights) once, fused application the factors' bytes and a second reading (CPU) per token."""
    rates = Rates(bytes_per_second=1e9, flops_per_second=1e15, launch_seconds=0.0)
    monkeypatch.setattr(auto, "measure_rates", lambda device: rates)
    plain = write_model(tmp_path / "plain")
    assert auto.choose(plain, prompt, 1000) == auto.choose(Decoder.from_model(plain), prompt, 1000) == "backbone"
    lora = injected(tmp_path / "lora", "lora")
    found = fm.moe.structure(lora).linears.values()
    weights = sum(part.base_layer.weight.nbytes for part in found)
    factors = sum(part.lora_A.nbytes + part.lora_B.nbytes for part in found)
    least = int((2 * weights + factors) / factors) + 1  # tokens; float32 weights are read once
    for model in (lora, Decoder.from_model(lora)):
        for tokens in (prompt, prompt.expand(3, -1)):
            assert auto.choose(model, tokens, least) == "merged"
            assert auto.choose(model, tokens, least - 2) == "fused"
    table = injected(tmp_path / "table", router="table")
    router = fm.moe.structure(table).routers["router"]
    for model in (table, Decoder.from_model(table)):
        assert auto.choose(model, prompt, 1000) == "fused"  # another mixture at each token
    router.ids[:], router.gates[:] = router.ids[0].clone(), router.gates[0].clone()
    for model in (table, Decoder.from_model(table)):
        assert auto.choose(model, prompt, 1000) == "merged"
        assert auto.choose(model, prompt.expand(2, -1), 1000) == "fused"
    router.gates[prompt[0, 4:]] *= 0.5  # in the prompt: 4 tokens, then 5
    assert auto._lifetime(router, prompt, 1000) == 4.5
    assert auto.choose(table, prompt, 1000) == "fused"
    monkeypatch.setattr(auto, "measure_rates", None)
    for method in ("lora_switch", "mola", "mixlora"):
        assert auto.choose(injected(tmp_path / method, method), prompt, 1000) == "fused"


def test_the_backbone_is_the_model_without_experts(switch, prompt, tmp_path):
    plain = type(switch).from_pretrained(tmp_path)
    expected = plain.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    for model in (switch, plain, Decoder.from_model(switch), Decoder.from_model(plain)):
        assert torch.equal(fm.moe.generate(model, prompt, 20, strategy="backbone"), expected)
    assert torch.equal(fm.moe.generate(plain, prompt, 20), expected)
    assert not torch.equal(fm.moe.generate(switch, prompt, 20), expected)


@pytest.mark.parametrize("of", ["model", "decoder"])
@pytest.mark.parametrize("strategy", ["backbone", "unfused", "fused"])
def test_a_padded_batch_is_each_row_alone(switch, of, strategy):
    model = switch if of == "model" else Decoder.from_model(switch)
    tokens = torch.randint(0, 67, (8, 11), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(11) >= torch.tensor([0, 3, 10, 1, 0, 7, 2, 5])[:, None]).long()
    together = fm.moe.generate(model, tokens, 12, strategy=strategy, attention_mask=mask)
    assert torch.equal(together[:, :11], tokens)
    for row in range(8):
        alone = fm.moe.generate(model, tokens[row : row + 1, mask[row].bool()], 12, strategy=strategy)
        assert torch.equal(together[row, -12:], alone[0, -12:])


@pytest.mark.parametrize("of", ["model", "decoder"])
@pytest.mark.parametrize("strategy", ["merged-simple", "merged"])
def test_a_batch_with_one_route_merges_and_others_are_refused(switch, prompt, of, strategy):
    model = switch if of == "model" else Decoder.from_model(switch)
    before = state(switch)
    alone = fm.moe.generate(model, prompt, 10, strategy=strategy)
    assert torch.equal(fm.moe.generate(model, prompt.expand(3, -1), 10, strategy=strategy), alone.expand(3, -1))
    other = torch.cat([prompt, prompt.flip(1)])
    with pytest.raises(StateError, match="one route for the whole batch"):
        fm.moe.generate(model, other, 30, strategy=strategy)
    assert state(switch) == before


@pytest.mark.parametrize("of", ["model", "decoder"])
def test_an_exception_leaves_everything_as_it_was(switch, prompt, of, monkeypatch):
    model = switch if of == "model" else Decoder.from_model(switch)
    switch.train()
    before = state(switch)
    calls = []

    def interrupted(logits, temperature, generator):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits.argmax(dim=-1)

    monkeypatch.setattr(sys.modules["fusedmerge.moe.generate"], "_sample", interrupted)
    for strategy in ("merged", "merged-simple", "fused"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            fm.moe.generate(model, prompt, 10, strategy=strategy)
        assert state(switch) == before
        assert all(module.training for module in switch.modules())
        assert not fm.moe.structure(switch).is_suspended
        assert not any("mixed" in part.__dict__ or part._forward_pre_hooks for part in fm.moe.structure(switch).linears.values())


@pytest.mark.parametrize("of", ["model", "decoder"])
def test_two_threads_take_turns(switch, prompt, of):
    model = switch if of == "model" else Decoder.from_model(switch)
    asked = [("merged", prompt), ("unfused", prompt.flip(1)), ("backbone", prompt), ("merged-simple", prompt.flip(1))]
    alone = [fm.moe.generate(model, tokens, 12, strategy=strategy) for strategy, tokens in asked]
    together = threading.Barrier(len(asked))
    wrapped = model
    if of == "model":
        wrapped = torch.nn.parallel.DataParallel(model)  # the same model, for half of them
        wrapped.get_input_embeddings = model.get_input_embeddings

    def run(strategy, tokens):
        together.wait()
        return fm.moe.generate(wrapped if "merged" in strategy else model, tokens, 12, strategy=strategy)

    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda each: run(*each), asked))
    for (strategy, _), expected, got in zip(asked, alone, found, strict=True):
        assert torch.equal(expected, got), strategy


def test_dropout_is_off_while_generating(tmp_path, prompt):
    model = injected(tmp_path, lora_dropout=0.5)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = fm.moe.generate(model, prompt, 10)
    model.train()
    assert all(torch.equal(fm.moe.generate(model, prompt, 10, strategy=strategy), expected) for strategy in ALL)


def test_eos(switch, prompt):
    whole = fm.moe.generate(switch, prompt, 30)
    new = whole[0, 9:].tolist()
    first, second = new[4], new[9]
    ended = fm.moe.generate(switch, prompt, 30, eos_token_id=first)
    assert torch.equal(ended, whole[:, : 9 + new.index(first) + 1])
    several = fm.moe.generate(switch, prompt, 30, eos_token_id=[66, second])
    assert torch.equal(several, whole[:, : 9 + min(new.index(second), new.index(66) if 66 in new else 99) + 1])
    rows = torch.cat([prompt, prompt.flip(1)])
    apart = fm.moe.generate(switch, rows, 30)
    stop = apart[0, 9:].tolist()[2]
    found = fm.moe.generate(switch, rows, 30, eos_token_id=stop)
    for row in range(2):
        new = apart[row, 9:].tolist()
        length = new.index(stop) + 1 if stop in new else 30
        assert torch.equal(found[row, 9 : 9 + length], apart[row, 9 : 9 + length])
        assert (found[row, 9 + length :] == stop).all()
    lengths = [min([*row[9:].tolist(), stop].index(stop) + 1, 30) for row in apart]
    assert found.shape[1] == 9 + max(lengths)


def test_sampling(switch, prompt):
    def sample(model, seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return fm.moe.generate(model, prompt, 25, temperature=temperature, generator=generator)

    decoder = Decoder.from_model(switch)
    assert torch.equal(sample(switch, 0), sample(switch, 0))
    assert torch.equal(sample(switch, 0), sample(decoder, 0))
    assert not torch.equal(sample(switch, 0), sample(switch, 1))
    assert torch.equal(sample(switch, 0, 1e-4), fm.moe.generate(switch, prompt, 25))


def test_no_new_tokens(switch, prompt):
    assert torch.equal(fm.moe.generate(switch, prompt, 0), prompt)
    assert fm.moe.generate(switch, prompt.int(), 1).dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"model": 3}, InvalidTypeError, "model"),
        ({"model": torch.nn.Linear(2, 2)}, InvalidTypeError, "model"),
        ({"input_ids": [[1, 2]]}, InvalidTypeError, "input_ids"),
        ({"input_ids": torch.zeros(1, 2)}, DtypeError, "input_ids"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, ShapeError, "input_ids"),
        ({"input_ids": torch.full((1, 2), 67)}, InvalidValueError, "input_ids"),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.int64)}, ShapeError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]])}, InvalidValueError, "attention_mask"),
        ({"max_new_tokens": -1}, InvalidValueError, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, InvalidTypeError, "max_new_tokens"),
        ({"max_new_tokens": True}, InvalidTypeError, "max_new_tokens"),
        ({"strategy": "magic"}, InvalidValueError, "strategy"),
        ({"strategy": None}, InvalidValueError, "strategy"),
        ({"temperature": -0.1}, InvalidValueError, "temperature"),
        ({"temperature": float("nan")}, InvalidValueError, "temperature"),
        ({"temperature": "hot"}, InvalidTypeError, "temperature"),
        ({"generator": 7}, InvalidTypeError, "generator"),
        ({"eos_token_id": "stop"}, InvalidTypeError, "eos_token_id"),
        ({"eos_token_id": [1.0]}, InvalidTypeError, "eos_token_id"),
        ({"eos_token_id": []}, InvalidValueError, "eos_token_id"),
        ({"eos_token_id": 67}, InvalidValueError, "eos_token_id"),
    ],
)
def test_arguments_that_are_refused(switch, prompt, changes, error, field):
    before = state(switch)
    arguments = {"model": switch, "input_ids": prompt, "max_new_tokens": 5, **changes}
    with pytest.raises(error, match=f"generate: {field}"):
        fm.moe.generate(**arguments)
    assert state(switch) == before


def test_strategies_that_a_model_cannot_run(tmp_path, prompt):
    plain = write_model(tmp_path / "plain")
    for model in (plain, Decoder.from_model(plain)):
        for strategy in ALL:
            with pytest.raises(StateError, match=f'strategy "{strategy}"'):
                fm.moe.generate(model, prompt, 5, strategy=strategy)
    mola = injected(tmp_path / "mola", "mola")
    for model in (mola, Decoder.from_model(mola)):
        with pytest.raises(StateError, match='"fused"'):
            fm.moe.generate(model, prompt, 5, strategy="merged")


def test_bfloat16_beside_float32_experts(tmp_path, prompt):
    """inject keeps factors in float32; a generation uses them in the weights' dtype, as the bank of a Switcher does."""
    model = injected(tmp_path, dtype=torch.bfloat16)
    tokens = torch.cat([prompt, torch.randint(0, 67, (1, 25), generator=torch.Generator().manual_seed(1))], dim=1)
    with fm.moe.structure(model).recording() as records, torch.no_grad():
        model(tokens)  # its router reads the token alone: it chooses the same in any forward, but in float64 at a tie
    wide = copy.deepcopy(model).double()
    for part in fm.moe.structure(wide).linears.values():
        part.lora_A.data = part.lora_A.data.bfloat16().double()
        part.lora_B.data = part.lora_B.data.bfloat16().double()
    with torch.no_grad():
        own = fm.moe.structure(wide)
        with own.forced(records[0].ids, records[0].gates):
            exact = wide(tokens).logits[:, 8:]
        with own.suspended():
            without = wide(tokens).logits[:, 8:]
    rounding = relative(forced(model, "backbone", tokens, 9), without)
    for strategy in ALL:
        error = relative(forced(model, strategy, tokens, 9), exact)
        assert error.mean() < 1.5 * rounding.mean()
        assert error.max() < 2 * rounding.max()
    assert relative(without, exact).min() > 2 * rounding.max()
