"""Every strategy agrees with float64 truth, token by token; a decode step waits for nothing; and the weights come back."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fusedmerge as fm
from fusedmerge.backend import linear
from fusedmerge.errors import ShapeError, StateError
from fusedmerge.moe import session as session_module
from fusedmerge.moe import strategies
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.experts import ExpertSet
from fusedmerge.moe.session import DecoderSession
from fusedmerge.ops import library
from tests import kit
from tests.kit import bits
from tests.moe.decoder_kit import Recorder, forced, make_experts, relative, truth_logits, write_model

PROMPT, NEW = 12, 200
RUNS = {
    "lora_switch": ("unfused", "merged-simple", "merged", "fused"),
    "lora": ("unfused", "merged-simple", "merged", "fused"),
    "mola": ("unfused", "merged-simple", "fused"),
    "mixlora": ("unfused", "fused"),
}
CASES = [(method, strategy) for method, found in RUNS.items() for strategy in found]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, "qwen2", dtype=torch.bfloat16)  # it has biases
    return directory


@pytest.fixture(scope="module")
def backbone(directory):
    """A decoder without experts, tokens, and its own errors: what bfloat16 rounding does to this model's logits."""
    decoder = Decoder.from_pretrained(directory)
    tokens = torch.randint(0, 67, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(1))
    exact = truth_logits(decoder, None, tokens)[:, PROMPT - 1 :]
    return decoder, tokens, exact, relative(forced(decoder, "backbone", tokens, PROMPT), exact)


@pytest.mark.parametrize(
    ("method", "strategy", "packed"),
    kit.fast_first([("lora_switch", "merged", True), ("lora_switch", "unfused", True), *((*c, False) for c in CASES if c[0] != "lora")], 2),
)
def test_200_tokens_are_within_bfloat16_rounding_of_the_truth(backbone, directory, method, strategy, packed):
    plain, tokens, without, rounding = backbone
    decoder = Decoder.from_pretrained(directory, packed=packed)
    before = {name: bits(weight) for name, weight in decoder.weights.items()}
    recorder = Recorder(make_experts(decoder, method))
    decoder.experts = recorder.experts
    logits = forced(decoder, strategy, tokens, PROMPT)
    exact = truth_logits(plain, recorder.played_back(recorder.experts), tokens)[:, PROMPT - 1 :]
    error = relative(logits, exact)
    assert error.shape == (1, NEW + 1)
    assert error.mean() < 1.5 * rounding.mean()
    assert error.max() < 2 * rounding.max()
    assert relative(without, exact).min() > 2 * error.max()  # the experts matter at every token
    assert {name: bits(weight) for name, weight in decoder.weights.items()} == before


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_float32_agrees_with_the_truth_to_its_own_rounding(directory, method, strategy):
    decoder = Decoder.from_pretrained(directory, dtype=torch.float32)
    recorder = Recorder(make_experts(decoder, method, k=3))
    decoder.experts = recorder.experts
    tokens = torch.randint(0, 67, (1, 40), generator=torch.Generator().manual_seed(2))
    logits = forced(decoder, strategy, tokens, 5)
    exact = truth_logits(decoder, recorder.played_back(recorder.experts), tokens)[:, 4:]
    assert relative(logits, exact).max() < 1e-5


@pytest.mark.parametrize("method", ["lora_switch", "mola", "mixlora"])
@pytest.mark.parametrize("strategy", ["unfused", "fused"])
def test_a_batch_whose_rows_route_differently(directory, method, strategy):
    decoder = Decoder.from_pretrained(directory, dtype=torch.float32)
    recorder = Recorder(make_experts(decoder, method))
    decoder.experts = recorder.experts
    tokens = torch.randint(0, 67, (8, 30), generator=torch.Generator().manual_seed(3))
    logits = forced(decoder, strategy, tokens, 6)
    exact = truth_logits(decoder, recorder.played_back(recorder.experts), tokens)[:, 5:]
    assert relative(logits, exact).max() < 1e-5
    steps = next(iter(recorder.found.values()))[1:]
    assert all(len(torch.unique(ids[:, 0], dim=0)) > 1 for ids, _ in steps)


def test_experts_of_a_bank(directory):
    """A bank's own storage, with padded and different ranks, and a router of one's own."""
    decoder = Decoder.from_pretrained(directory, dtype=torch.float32)
    targets = [name for names in decoder.names for name in names.values()]
    weights = {name: decoder.weights[name] for name in targets}
    bank = fm.AdapterBank.random(weights, 3, 5, targets=targets, delta=0.2)
    router = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    experts = ExpertSet.of_bank(bank, router, 2)
    assert experts.linears[targets[0]].a.shape == (3, 5, 32)
    assert experts.linears[targets[0]].a.data_ptr() == bank.target(targets[0]).a.data_ptr()
    recorder = Recorder(experts)
    decoder.experts = recorder.experts
    tokens = torch.randint(0, 67, (1, 20), generator=torch.Generator().manual_seed(5))
    logits = forced(decoder, "merged", tokens, 5)
    exact = truth_logits(decoder, recorder.played_back(experts), tokens)[:, 4:]
    assert relative(logits, exact).max() < 1e-5
    with pytest.raises(ShapeError, match="the bank's slots"):
        ExpertSet.of_bank(bank, router[:2], 2)


def test_a_router_sits_at_the_first_adapted_linear(directory):
    """Experts from layer 0's o_proj on: the router reads o_proj's input, and earlier linears stay plain."""
    decoder = Decoder.from_pretrained(directory, dtype=torch.float32)
    whole = make_experts(decoder)
    kept = {name: linear for name, linear in whole.linears.items() if name not in list(decoder.names[0].values())[:3]}
    recorder = Recorder(ExpertSet("lora_switch", kept, whole.routers))
    decoder.experts = recorder.experts
    tokens = torch.randint(0, 67, (1, 20), generator=torch.Generator().manual_seed(6))
    logits = {strategy: forced(decoder, strategy, tokens, 5) for strategy in RUNS["lora_switch"]}
    wide = decoder.to(torch.float64)  # routes by itself
    exact = truth_logits(decoder, ExpertSet("lora_switch", kept, wide.experts.routers), tokens)[:, 4:]
    assert all(relative(found, exact).max() < 1e-5 for found in logits.values())


def test_merging_needs_one_route(directory):
    decoder = Decoder.from_pretrained(directory)
    before = {name: bits(weight) for name, weight in decoder.weights.items()}
    decoder.experts = make_experts(decoder)
    tokens = torch.randint(0, 67, (2, 6), generator=torch.Generator().manual_seed(7))
    for strategy in ("merged", "merged-simple"):
        with DecoderSession(decoder, strategy, 2, 6) as session:
            session.prefill(tokens[:, :4])
            session.step(tokens[:1, 4].expand(2))  # the same token in both rows, read by a router that sees the token alone
            with pytest.raises(StateError, match="one route for the whole batch"):
                session.step(tokens[:, 5])
        assert {name: bits(weight) for name, weight in decoder.weights.items()} == before
    for method, strategies_that_cannot in (("mola", ("merged",)), ("mixlora", ("merged", "merged-simple"))):
        decoder.experts = make_experts(decoder, method)
        for strategy in strategies_that_cannot:
            with pytest.raises(StateError, match='strategy "fused"'):
                DecoderSession(decoder, strategy, 1, 4)


def test_a_second_prefill_is_unmerged_too(directory):
    decoder = Decoder.from_pretrained(directory)
    decoder.experts = make_experts(decoder)
    tokens = torch.randint(0, 67, (1, 8), generator=torch.Generator().manual_seed(8))
    for strategy in ("merged", "merged-simple"):
        with DecoderSession(decoder, strategy, 1, 8) as session:
            first = session.prefill(tokens[:, :6])
            session.step(tokens[:, 6])
            assert torch.equal(session.prefill(tokens[:, :6]), first)


# ---------------------------------------------------------------------- what a CUDA graph needs


class ReadsNothing:
    """In place of a Switcher: takes ids and gates as they are."""

    def __init__(self, weights, bank):
        self.seen = []

    def switch(self, ids, gates):
        self.seen.append((ids.shape, ids.dtype, gates.dtype))

    def restore(self):
        pass

    close = restore


@pytest.mark.parametrize(
    ("method", "strategy", "packed"),
    [("lora_switch", "backbone", True), ("lora_switch", "merged", True), *((*case, False) for case in CASES)],
)
def test_a_step_waits_for_no_value(directory, monkeypatch, method, strategy, packed):
    """Fake tensors have no values: whatever would read one on the host (.item(), bool(), a data-dependent shape) raises."""
    monkeypatch.setattr(strategies, "Switcher", ReadsNothing)
    monkeypatch.setattr(ExpertSet, "make_bank", lambda self: None)
    real = Decoder.from_pretrained(directory)
    experts = make_experts(real, method)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {name: mode.from_tensor(weight) for name, weight in real.weights.items()}
        decoder = Decoder(real.config, weights, packed=packed)
        decoder.experts = fake(experts, mode)
        with DecoderSession(decoder, strategy, 1, 9) as session:
            session.prefill(torch.zeros(1, 5, dtype=torch.int64))
            for _ in range(2):
                assert session.step(torch.zeros(1, dtype=torch.int64)).shape == (1, 67)
            if strategy == "merged":
                assert session._decode.switcher.seen == [((1 if method == "lora" else 2,), torch.int32, torch.float32)] * 2
        with pytest.raises(DataDependentOutputException):
            bool(torch.zeros(1) == 0)  # so it would raise


def fake(experts, mode):
    linears = {
        name: type(linear)(*(mode.from_tensor(tensor) for tensor in (linear.a, linear.b, linear.scaling)), linear.router)
        for name, linear in experts.linears.items()
    }
    routers = {
        name: partial(fm.route_topk, router_weight=mode.from_tensor(router.keywords["router_weight"]), k=router.keywords["k"])
        for name, router in experts.routers.items()
    }
    return ExpertSet(experts.method, linears, routers)


@pytest.mark.parametrize("strategy", RUNS["lora_switch"])
def test_capture_and_replay(directory, monkeypatch, strategy):
    """The protocol around a CUDA graph, with stand-ins: a capture changes nothing, a replay runs the step on what the buffers then hold."""
    decoder = Decoder.from_pretrained(directory)
    decoder.experts = make_experts(decoder)
    tokens = torch.randint(0, 67, (1, 20), generator=torch.Generator().manual_seed(9))
    expected = forced(decoder, strategy, tokens, 5)

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1
            session._step()

    @contextmanager
    def capture(graph):
        held = session._position.clone(), session._logits.clone(), session.cache.keys.clone(), session.cache.values.clone()
        yield
        for tensor, value in zip((session._position, session._logits, session.cache.keys, session.cache.values), held, strict=True):
            tensor.copy_(value)

    class Stream:
        def wait_stream(self, other):
            pass

    for name, stand_in in (
        ("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", capture), ("stream", lambda _: nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(session_module.torch.cuda, name, stand_in)
    with DecoderSession(decoder, strategy, 1, 20) as session:
        session._captures = True
        found = [session.prefill(tokens[:, :5])]
        found += [session.step(tokens[:, t]).clone() for t in range(5, 20)]
        assert session._graph._graph.replays == 15
    assert torch.equal(torch.stack(found, dim=1), expected)


@pytest.mark.parametrize(
    ("method", "strategy"),
    kit.fast_first([("lora_switch", "fused"), ("lora_switch", "merged"), ("mola", "fused"), ("mixlora", "fused")]),
)
def test_on_the_kernels_of_the_simulator(tmp_path, sim_library, monkeypatch, method, strategy):
    """A prompt of 17 tokens (SGMV), then steps of one (the fused GEMV, or the switch kernel), through the CUDA sources."""
    write_model(tmp_path, dtype=torch.bfloat16, num_hidden_layers=1)
    decoder = Decoder.from_pretrained(tmp_path)
    tokens = torch.randint(0, 67, (1, 20), generator=torch.Generator().manual_seed(1))
    plain = truth_logits(decoder, None, tokens)[:, 16:]
    rounding = relative(forced(decoder, "backbone", tokens, 17), plain)
    recorder = Recorder(make_experts(decoder, method))
    decoder.experts = recorder.experts
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    calls = Counter()
    for module, name in ((linear.Group, "run"), (library, "group_tokens"), (library, "add_adapters")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, kernel=kernel: (calls.update([name]), kernel(*args))[1])
    logits = forced(decoder, strategy, tokens, 17)
    assert calls["add_adapters"] == 7  # linears
    groups = {"lora_switch": 4, "mola": 7, "mixlora": 2 + 3}[method]
    assert calls["run"] == (0 if strategy == "merged" else 3 * groups)
    assert calls["group_tokens"] == {"lora_switch": 1, "mola": 7, "mixlora": 2}[method]  # mixlora: attention, and the MLP
    exact = truth_logits(decoder, recorder.played_back(recorder.experts), tokens)[:, 16:]
    error = relative(logits, exact)
    assert error.max() < 3 * rounding.max()
    assert relative(plain, exact).min() > 2 * error.max()
