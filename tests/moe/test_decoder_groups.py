"""Strategy `fused` on the kernels: values, launches, what a token's bits depend on, and what runs where the kernels do not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fusedmerge as fm
from fusedmerge import backend
from fusedmerge.backend.kernels import SimLauncher
from fusedmerge.cost import Rates, Work
from fusedmerge.moe import auto, fused_kernels
from fusedmerge.moe.config import GATINGS
from fusedmerge.moe.decoder import Cache, Decoder
from fusedmerge.moe.experts import ExpertSet
from fusedmerge.moe.fused_kernels import FusedKernels, added_launches
from fusedmerge.moe.routing import Router, TableRouter
from fusedmerge.moe.session import DecoderSession
from fusedmerge.moe.strategies import make
from fusedmerge.moe.unmerged import Fused
from perf import model
from tests.kit import bits
from tests.moe.decoder_kit import forced, make_experts, relative, routed, truth_logits, write_model

PAIR = ["prologue", "gemv"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, dtype=torch.bfloat16, hidden_size=64, intermediate_size=100, attention_bias=True)
    return directory


@pytest.fixture
def decoder(saved):
    return Decoder.from_pretrained(saved)


@pytest.fixture
def on_simulator(sim_library, monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")


@pytest.fixture
def launched(on_simulator, monkeypatch):
    """The names of the kernels that were launched; each programmatically, where that may be."""
    names, launch = [], SimLauncher.launch

    def noted(self, kernel, params, grid, shared_bytes, programmatic=False):
        name = kernel.name.split("_")[0]
        assert programmatic or name not in ("prologue", "gemv") or names[-1:] != ["prologue"]
        names.append(name)
        launch(self, kernel, params, grid, shared_bytes, programmatic)

    monkeypatch.setattr(SimLauncher, "launch", noted)
    return names


def in_torch(monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "cpu")
    monkeypatch.setattr(backend, "extension", lambda: None)


def random_tokens(*shape):
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(5))


def with_routers(experts, change):
    return ExpertSet(experts.method, experts.linears, {name: change(router) for name, router in experts.routers.items()})


def as_module(router, gating="softmax_of_topk"):
    """What `inject` leaves: a float32 router."""
    weight = router.keywords["router_weight"]
    made = Router(*weight.shape, router.keywords["k"], gating, 0.02, 0, weight.device)
    made.weight.data.copy_(weight)
    return made


def assert_near_truth(decoder, tokens, prompt):
    """The fused logits are as near to the truth as bfloat16 leaves the plain backbone's; returns the experts over the routes taken."""
    plain = truth_logits(decoder, None, tokens)[:, prompt - 1 :]
    rounding = relative(forced(decoder, "backbone", tokens, prompt), plain)
    logits, played = routed(decoder, "fused", tokens, prompt)
    exact = truth_logits(decoder, played, tokens)[:, prompt - 1 :]
    error = relative(logits, exact)
    assert error.mean() < 1.3 * rounding.mean()
    assert error.max() < 2 * rounding.max()
    assert relative(plain, exact).min() > 2 * error.max()  # the experts matter at every token
    return played


ROUTERS = {"fused": lambda router: router, "module": as_module, "asked": lambda router: partial(partial.__call__, router)}
CASES = [("lora_switch", kind) for kind in ROUTERS] + [("mola", "fused"), ("mola", "asked"), ("lora", "fused")]


@pytest.mark.parametrize("batch", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_each_token_is_within_bfloat16_rounding_of_the_truth(decoder, on_simulator, method, kind, batch):
    decoder.experts = with_routers(make_experts(decoder, method), ROUTERS[kind])
    assert isinstance(make(decoder, "fused"), FusedKernels)
    played = assert_near_truth(decoder, random_tokens(batch, 6), 3)
    if batch > 1 and method != "lora":
        ids = next(iter(played.routers.values()))(None)[0]
        assert all(len(torch.unique(ids[:, t], dim=0)) > 1 for t in range(3, 6))


def test_the_prologues_norm_rounds_as_transformers_does(decoder, on_simulator):
    """A group's x against transformers' module, bit for bit but for float32's last place."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    decoder.experts = ExpertSet("lora", {}, {})
    name = "model.layers.1.input_layernorm.weight"
    norm = LlamaRMSNorm(64, decoder.config.norm_eps)
    norm.weight.data = decoder.weights[name]
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    apply = make(decoder, "fused")
    apply.start(random_tokens(4, 1), None)
    apply._targets["identity"] = replace(apply._targets[decoder.names[0]["q_proj"]], weight=torch.eye(64).bfloat16(), bias=None)
    got = apply.project_normed(x, name, ["identity"])[0]
    assert (got != norm(x)).sum() <= 1
    assert (decoder.norm(x, name) != norm(x)).sum() > 1  # torch's own does not round in between


# ---------------------------------------------------------------------- launches


def step_launches(decoder, launched, batch=1):
    with DecoderSession(decoder, "fused", batch, 20) as session:
        session.prefill(random_tokens(batch, 2))
        launched.clear()
        session.step(random_tokens(batch))
    return list(launched)


@pytest.mark.parametrize(("method", "pairs"), [("lora_switch", 4), ("lora", 4), ("mola", 4)])
def test_launches_of_a_step(decoder, launched, method, pairs):
    decoder.experts = make_experts(decoder, method)
    assert step_launches(decoder, launched, batch=2) == PAIR * pairs * decoder.config.layers
    assert 2 * pairs == model.FUSED_LAUNCHES - 1  # attention


def _table(experts):
    return ExpertSet("lora_switch", experts.linears, {"token": TableRouter(torch.ones(67, 2), torch.ones(67, 2))})


def _only(*parts):
    def change(experts):
        few = {name: linear for name, linear in experts.linears.items() if name.split(".")[-2] in parts}
        return ExpertSet(experts.method, few, experts.routers)

    return change


def _without_rank(experts):
    """o_proj and q_proj have experts of rank 0."""
    linears = {
        name: replace(linear, a=linear.a[:, :0], b=linear.b[..., :0]) if "o_proj" in name or "q_proj" in name else linear
        for name, linear in experts.linears.items()
    }
    return ExpertSet(experts.method, linears, experts.routers)


def _some(change, *parts):
    """The routers of these linears changed."""

    def changed(experts):
        made = {name: change(router) if name.split(".")[-1] in parts else router for name, router in experts.routers.items()}
        return ExpertSet(experts.method, experts.linears, made)

    return changed


ADDED = {
    "lora": ("lora", lambda experts: experts, 1),
    "lora without o": ("lora", _only("k_proj", "down_proj"), 0),
    "table": ("lora_switch", _table, 1),
    "router": ("lora_switch", lambda experts: experts, 1),
    "router asked": ("lora_switch", lambda experts: with_routers(experts, ROUTERS["asked"]), 1),
    "rank 0": ("lora_switch", lambda experts: _table(_without_rank(experts)), 0),
    "mola": ("mola", lambda experts: experts, 1),
    "mola of v and o": ("mola", _only("v_proj", "o_proj"), 1),
    "mola of two": ("mola", _only("k_proj", "v_proj"), 0),
    "mola, rank 0": ("mola", _without_rank, 1),
    "mola asked": ("mola", lambda experts: with_routers(experts, ROUTERS["asked"]), 7),
    "mola, two asked": ("mola", _some(ROUTERS["asked"], "q_proj", "up_proj"), 5),
    "mola, another k": ("mola", _some(lambda router: partial(router, k=3), "k_proj"), 3),
    "mola, another dtype": ("mola", _some(as_module, "gate_proj", "up_proj", "v_proj"), 3),
}


@pytest.mark.parametrize("case", ADDED)
def test_launches_that_experts_add(decoder, launched, case):
    method, change, per_layer = ADDED[case]
    decoder.experts = ExpertSet("lora", {}, {})
    plain = step_launches(decoder, launched)
    decoder.experts = change(make_experts(decoder, method))
    fused = [name for name in step_launches(decoder, launched) if name != "route"]
    assert added_launches(decoder) == len(fused) - len(plain) == per_layer * decoder.config.layers
    if case == "lora":
        assert per_layer == model.FUSED_LAUNCHES - model.BACKBONE_LAUNCHES


def test_routers_share_a_launch_while_it_has_slots(decoder, launched):
    """11 slots for each of q, k and v are more than 32; for gate and up they fit."""
    decoder.experts = make_experts(decoder, "mola", count=11, k=11)
    assert step_launches(decoder, launched) == PAIR * 5 * decoder.config.layers
    assert added_launches(decoder) == 3 * decoder.config.layers


def test_launches_are_told_for_groups_only(decoder, on_simulator, monkeypatch):
    assert added_launches(decoder) is None  # no experts
    decoder.experts = make_experts(decoder, "lora")
    assert (added_launches(decoder, 16), added_launches(decoder, 17)) == (2, None)
    in_torch(monkeypatch)
    assert added_launches(decoder) is None
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    decoder.experts = make_experts(decoder, "mixlora")
    assert added_launches(decoder) is None


def test_auto_counts_the_launches_of_groups(decoder, on_simulator, monkeypatch):
    """Where launches are all that costs, and a switch costs 31: the fused step adds one a layer, by `lora_linear` seven."""
    monkeypatch.setattr(auto, "measure_rates", lambda device: Rates(bytes_per_second=1e18, flops_per_second=1e18, launch_seconds=1.0))
    monkeypatch.setattr(auto, "switch_work", lambda sizes, k: Work(0, 0, 31))
    decoder.experts = make_experts(decoder, "lora")
    for batch, least in ((1, 16), (16, 16), (17, 3)):  # 16 * 2 > 31 > 15 * 2, 3 * 14 > 31 > 2 * 14
        tokens = random_tokens(batch, 2)
        assert (auto.choose(decoder, tokens, least), auto.choose(decoder, tokens, least - 1)) == ("merged", "fused")
    in_torch(monkeypatch)
    assert (auto.choose(decoder, random_tokens(1, 2), 3), auto.choose(decoder, random_tokens(1, 2), 2)) == ("merged", "fused")


def test_a_router_apart_is_one_launch_more(decoder, launched, monkeypatch):
    decoder.experts = make_experts(decoder)
    monkeypatch.setattr(fused_kernels, "_SPARE_BYTES", 0)
    assert step_launches(decoder, launched) == ["route", *PAIR * 8]


def test_linears_without_experts_join_the_others(decoder, launched):
    whole = make_experts(decoder)
    few = {name: linear for name, linear in whole.linears.items() if "k_proj" in name or "down_proj" in name}
    decoder.experts = ExpertSet("lora_switch", few, whole.routers)
    assert step_launches(decoder, launched) == [*PAIR, "gemv", *PAIR, *PAIR] * 2
    assert_near_truth(decoder, random_tokens(2, 5), 3)


# ---------------------------------------------------------------------- bits


def linears_of_a_layer(apply, decoder, x, attended):
    """What passes through the kernels for x [B, 1, hidden]: all of a layer but its attention."""
    apply.start(torch.zeros(x.shape[:2], dtype=torch.int64), Cache(decoder, len(x), 1))
    names, norms = decoder.names[0], [f"model.layers.0.{part}_layernorm.weight" for part in ("input", "post_attention")]
    outs = list(apply.project_normed(x, norms[0], [names[part] for part in ("q_proj", "k_proj", "v_proj")]))
    outs.append(apply.project_added(attended, names["o_proj"], x))
    outs.append(apply.feed_forward(outs[-1], norms[1], names["gate_proj"], names["up_proj"], names["down_proj"]))
    return outs


@pytest.mark.parametrize(("method", "kind"), [("lora_switch", "fused"), ("lora_switch", "asked"), ("mola", "module")])
def test_a_tokens_bits_do_not_depend_on_the_batch(decoder, on_simulator, method, kind):
    decoder.experts = with_routers(make_experts(decoder, method), ROUTERS[kind])
    apply = make(decoder, "fused")
    x, attended = torch.randn(2, 11, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = linears_of_a_layer(apply, decoder, x, attended)
    ids = next(iter(apply.chosen.values()))[0]
    assert len(torch.unique(ids, dim=0)) > 3
    for rows in ([3], [10, 0, 5, 3]):
        for among, alone in zip(whole, linears_of_a_layer(apply, decoder, x[rows], attended[rows]), strict=True):
            assert bits(among[rows]) == bits(alone)


def test_linears_that_share_a_launch_have_the_bits_of_linears_that_do_not(decoder, launched, monkeypatch):
    """mola, where k_proj has no experts, and q_proj's are of rank 0."""
    experts = make_experts(decoder, "mola")
    few = {name: linear for name, linear in experts.linears.items() if "k_proj" not in name}
    decoder.experts = _without_rank(ExpertSet("mola", few, experts.routers))
    x, attended = torch.randn(2, 11, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    outs, chosen, counts = [], [], []
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(fused_kernels._Group, "takes", lambda self, other: False)
        apply = make(decoder, "fused")
        launched.clear()
        outs.append(linears_of_a_layer(apply, decoder, x, attended))
        counts.append(len(launched))
        chosen.append({name: [part.tolist() for part in route] for name, route in apply.chosen.items()})
    assert counts == [8, 12] and len(chosen[0]) == 6
    assert all(bits(one) == bits(other) for one, other in zip(*outs, strict=True)) and chosen[0] == chosen[1]


def test_tokens_without_experts_get_the_backbones_bits_and_no_factor_is_read(decoder, on_simulator):
    experts = make_experts(decoder)
    nothing = {name: replace(linear, a=linear.a * float("nan"), b=linear.b * float("nan")) for name, linear in experts.linears.items()}
    empty = TableRouter(torch.full((67, 2), -1), torch.zeros(67, 2))
    x, attended = torch.randn(2, 3, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    outs = []
    for linears in (nothing, {}):
        decoder.experts = ExpertSet("lora_switch", linears, {"token": empty})
        outs.append(linears_of_a_layer(make(decoder, "fused"), decoder, x, attended))
    assert all(bits(one) == bits(other) and one.isfinite().all() for one, other in zip(*outs, strict=True))


KINDS = [ROUTERS["fused"], ROUTERS["asked"], *(partial(as_module, gating=gating) for gating in GATINGS)]


@pytest.mark.parametrize("kind", KINDS, ids=["fused", "asked", *GATINGS])
def test_routers_read_what_their_linears_read(decoder, on_simulator, kind):
    decoder.experts = with_routers(make_experts(decoder, "mola"), kind)
    apply = make(decoder, "fused")
    x, attended = torch.randn(2, 5, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    stream = linears_of_a_layer(apply, decoder, x, attended)[3]
    norm, names = "model.layers.0.{}_layernorm.weight", decoder.names[0]
    chosen, apply.chosen = apply.chosen, {}
    gated, value = apply.project_normed(stream, norm.format("post_attention"), (names["gate_proj"], names["up_proj"]))
    seen = {"q_proj": decoder.norm(x, norm.format("input")), "o_proj": attended, "down_proj": F.silu(gated) * value}
    for part, read in seen.items():
        ids, gates = decoder.experts.routers[f"0.{part}"](read)
        assert torch.equal(chosen[f"0.{part}"][0], ids)
        assert (chosen[f"0.{part}"][1] - gates).abs().max() < 0.01


# ---------------------------------------------------------------------- where the kernels do not run


def test_more_than_16_tokens_go_linear_by_linear(decoder, launched):
    decoder.experts = make_experts(decoder)
    assert_near_truth(decoder, random_tokens(3, 6), 6)
    assert launched and not {"prologue", "gemv"} & set(launched)


def test_what_the_kernels_do_not_take(decoder, on_simulator, monkeypatch):
    experts = make_experts(decoder)
    table = partial(ExpertSet, "lora_switch", experts.linears)
    for width, kind in ((32, FusedKernels), (33, Fused)):
        decoder.experts = table({"token": TableRouter(torch.zeros(67, width), torch.zeros(67, width))})
        assert type(make(decoder, "fused")) is kind
    decoder.experts = experts
    name = decoder.names[0]["q_proj"]
    wide = decoder.to(torch.float32)
    assert type(make(wide, "fused")) is Fused
    held, decoder.weights[name] = decoder.weights[name], decoder.weights[name].T.contiguous().T
    assert type(make(decoder, "fused")) is Fused
    decoder.weights[name] = held
    in_torch(monkeypatch)
    assert type(make(decoder, "fused")) is Fused
    with pytest.raises(fm.FusedMergeError, match="FUSEDMERGE_BACKEND"):
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "none")
        make(decoder, "fused")


def test_a_router_that_does_not_fit_is_refused(decoder, on_simulator):
    experts = make_experts(decoder)
    for weight, k in ((torch.zeros(4, 63), 2), (torch.zeros(4, 64), 5)):
        decoder.experts = with_routers(experts, lambda _, weight=weight, k=k: partial(fm.route_topk, router_weight=weight, k=k))
        with pytest.raises(fm.FusedMergeError, match="route_topk"):
            decoder.logits(random_tokens(1, 1))
