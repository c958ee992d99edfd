"""The decode suite and the ablations at toy size: they run, and a wrong result fails them."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch

from fusedmerge.backend.linear import Group
from fusedmerge.moe import unmerged
from perf import ablations, decoding
from perf import test_decode as decode_suite
from perf.decoding import Row, Workbench
from perf.evidence import Suite
from tests.kit import fast_first
from tests.perf_kit import CEILINGS, CPU, TOY, Benchmark

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bench():
    return Workbench(TOY, CPU)


@pytest.fixture
def decode(monkeypatch):
    for suite in (decode_suite, ablations):
        monkeypatch.setattr(suite, "WHERE", CPU)
        monkeypatch.setattr(suite, "GPU", False)
        monkeypatch.setattr(suite, "BACKBONE", TOY)
        monkeypatch.setattr(suite, "LONGEST", 8)
    return types.SimpleNamespace(getoption=lambda name: {"--sharegpt": None, "--new-tokens": 2}[name])


def row_of(engine, method, strategy):
    return Row(f"{method}, {strategy}", method, strategy, engine, config={"r": 4})


@pytest.mark.parametrize("strategy", fast_first(["fused", "merged"]))
def test_errors_where_kernels_choose_the_experts(monkeypatch, sim_library, strategy):
    """As on a GPU: no router is called, and the truth follows the kernels' choices all the same."""
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    row = row_of("decoder", "lora_switch", strategy)
    assert Workbench(TOY, CPU).checked(row)["of_backbone"] < decoding.WORST_ERROR


@pytest.mark.parametrize(
    "row",
    [
        row_of("decoder", "lora_switch", "merged"), row_of("decoder", "lora_switch", "auto"), row_of("transformers", "xlora", "unfused"),
        row_of("transformers", "moral", "merged-simple"), Row("backbone", "", "backbone"),
    ],
    ids=lambda row: f"{row.method}-{row.strategy}",
)  # fmt: skip
def test_a_row_of_the_table(bench, decode, row):
    suite = Suite("decode")
    decode_suite.test_row(Benchmark(), suite, CEILINGS, 2, bench, row, decode)
    [case] = suite.cases
    assert case["error"]["of_backbone"] < decoding.WORST_ERROR and case["counted_launches"] > 20 and len(case["samples_ms"]) == 2
    assert case["memory_bytes"] > 2 * TOY.adapted and (case["ratio"] == 1) == (row.method == "")
    assert case["strategy"] == ("fused" if row.strategy == "auto" else row.strategy)


def spoil_gates(monkeypatch, change):
    """Change the gates of linears in decoding (those that know them beforehand), but not in the float64 truth."""
    right, run = unmerged.lora_linear, Group.run

    def wrong(x, weight, a, b, ids, gates, *rest):
        return right(x, weight, a, b, ids, gates if x.dtype == torch.float64 else change(gates), *rest)

    def wrong_run(group, where, x, known=None, *rest):
        return run(group, where, x, known and replace(known, gates=change(known.gates)), *rest)

    monkeypatch.setattr(unmerged, "lora_linear", wrong)
    monkeypatch.setattr(Group, "run", wrong_run)


def test_a_wrong_logit_fails_a_row(bench, decode, monkeypatch):
    row = row_of("decoder", "lora_switch", "fused")
    spoil_gates(monkeypatch, lambda gates: 1.5 * gates)
    with pytest.raises(AssertionError, match="times the backbone's"):
        decode_suite.test_row(Benchmark(), Suite("decode"), CEILINGS, 1, bench, row, decode)


def test_a_batch_that_mixes_its_routes_up_is_noticed(bench, decode, monkeypatch):
    row = row_of("decoder", "lora_switch", "fused")
    spoil_gates(monkeypatch, lambda gates: gates.roll(1, 0))
    with pytest.raises(AssertionError, match="a batch of 3"):
        decode_suite.check_batch(bench, row, 3)


def test_a_wrong_prompt_is_noticed(bench, decode, monkeypatch):
    suite = Suite("decode")
    decode_suite.test_prefill(Benchmark(), suite, CEILINGS, 1, bench, 20)
    assert [case["series"] for case in suite.cases] == ["fused", "unfused", "backbone"]
    spoil_gates(monkeypatch, lambda gates: 1.5 * gates)
    with pytest.raises(AssertionError, match="fused: .* times"):
        decode_suite.test_prefill(Benchmark(), suite, CEILINGS, 1, bench, 20)


def test_batches(bench, decode):
    suite = Suite("decode")
    decode_suite.test_batch(Benchmark(), suite, CEILINGS, 2, bench, 3)
    assert [case["series"] for case in suite.cases] == ["fused", "backbone", "unfused"]


def test_the_crossover_picture(bench, decode, monkeypatch):
    monkeypatch.setattr(decode_suite, "LIFETIMES", (1, 3))
    suite, measured = Suite("decode"), {}
    suite.setting["text"] = "A model"
    for life in (1, 3):
        decode_suite.test_crossover(Benchmark(), suite, CEILINGS, 2, bench, measured, life)
    assert {case["series"] for case in suite.cases} == {"merged", "fused", "auto"} and {case["x"] for case in suite.cases} == {1, 3}
    assert all(case["strategy"] in ("merged", "fused") for case in suite.cases)
    assert set(suite.setting["break_even"]) == {"measured", "modelled", "fm.crossover"} and "breaks even" in suite.setting["text"]
    monkeypatch.setattr(decode_suite, "LIFETIMES", (2, 3))
    measured = {("merged", 2): 7.0, ("backbone", 2): 2.0, ("fused", 3): 2.5, ("backbone", 3): 2.0}
    assert decode_suite.break_even(bench, CEILINGS, measured)["measured"] == pytest.approx(20)
    assert decode_suite.break_even(bench, CEILINGS, {**measured, ("fused", 3): 2.0})["measured"] is None


def test_tables_have_a_mixture_for_each_class(bench):
    decode_suite.table_runs(bench)
    table = next(iter(decode_suite.fm.moe.structure(bench.adapted("lora_switch", {"router": "table"})).routers.values()))
    for number in range(3):
        ids, gates = table(decode_suite.block(number, 5).to(CPU))
        assert (ids == ids[:, :1]).all() and (gates == gates[:, :1]).all()
    assert not torch.equal(table.gates[0], table.gates[1])


@pytest.mark.parametrize("row", ablations.ROUTING[:3], ids=lambda row: row.strategy)
def test_layer_wise_routing(bench, decode, row):
    run = ablations.run_of(bench, row)
    assert len(run.model.experts.routers) == TOY.layers == len({linear.router for linear in run.model.experts.linears.values()})
    before = {name: weight.clone() for name, weight in run.model.weights.items()}
    tokens = bench.tokens(1, 6)
    with run.open(8) as session:
        first = session.prefill(tokens).clone()
        session.step(tokens[:, 0])
        assert torch.equal(session.prefill(tokens), first)
    suite = Suite("ablations")
    ablations.measured(Benchmark(), suite, CEILINGS, 2, bench, [row], 2, {})
    assert suite.cases[0]["error"]["of_backbone"] < decoding.WORST_ERROR
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.weights.items())


def test_lengths_of_prompts(tmp_path):
    found = decoding.lengths(2000, 4, 1024)
    assert found == decoding.lengths(2000, 4, 1024) and found != decoding.lengths(2000, 4, 1024, seed=1)
    assert min(found) == 4 and max(found) == 1024 and 50 < sorted(found)[1000] < 70 and 110 < sum(found) / 2000 < 170
    turns = [[{"from": "human", "value": "x" * 80}], [{"from": "gpt", "value": "y" * 400}], [{"from": "human", "value": "z" * 4000}]]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": conversation} for conversation in turns]))
    assert set(decoding.lengths(50, 4, 100, path)) == {20, 100}
    path.write_text("[]")
    with pytest.raises(ValueError, match="no conversation"):
        decoding.lengths(1, 4, 8, path)
