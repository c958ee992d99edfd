"""`fm.crossover` and the byte counts behind it."""

import math

import pytest
import torch

import fusedmerge as fm
from fusedmerge import backend, cost, errors
from fusedmerge.cost import Rates, TargetSize, Work
from tests import kit

RATES = Rates(bytes_per_second=1e9, flops_per_second=1e12, launch_seconds=0.0)


def llama_2_7b(rank):
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [TargetSize(rows, cols, rank, 2, 2) for rows, cols in layer * 32]


@pytest.fixture
def subject():
    weights = kit.make_weights([(64, 48), (32, 96)])
    return weights, fm.AdapterBank.random(weights, 4, 8)  # rank 16 as stored


def test_bytes_of_llama_2_7b():
    """The figures of the docs: 12.95 GB of weights; top-2 adds 0.64 GB at r = 64, 0.16 GB at r = 16."""
    assert cost.switch_work(llama_2_7b(64), 2) == Work(26_543_652_864, 1_657_857_376_256, 1)
    assert cost.switch_work(llama_2_7b(64), 2, "inplace").nbytes == 26_543_652_864 + 639_631_360
    assert cost.fused_work(llama_2_7b(64), 2, 8) == Work(639_631_360, 639_631_360, 224)
    assert cost.fused_work(llama_2_7b(16), 2, 8).nbytes == 159_907_840


def test_a_switch_counts_what_is_moved(subject):
    weights, bank = subject
    sizes = cost.target_sizes(weights, bank)
    assert sizes == [TargetSize(64, 48, 16, 2, 2), TargetSize(32, 96, 16, 2, 2)]
    factors = sum(bank.target(name).a[0].nbytes + bank.target(name).b[0].nbytes for name in bank.targets)
    both = sum(tensor.nbytes for tensor in weights.values())
    for k in (1, 3):
        assert cost.switch_work(sizes, k).nbytes == 2 * both + k * factors
        assert cost.switch_work(sizes, k, "inplace").nbytes == 2 * both + 2 * k * factors
        assert cost.fused_work(sizes, k, 4).nbytes == k * factors
        assert cost.fused_work(sizes, k, 4, second_pass=True).nbytes == k * factors + both
        assert cost.fused_work(sizes, k, 4).launches == 2 and cost.switch_work(sizes, k).launches == 1


def test_dtypes_of_weights_and_factors_are_counted_apart():
    weights = kit.make_weights([(64, 48)])
    bank = fm.AdapterBank.random(weights, 2, 16, dtype=torch.float32)
    sizes = cost.target_sizes(weights, bank)
    assert sizes == [TargetSize(64, 48, 16, 2, 4)]
    assert cost.fused_work(sizes, 1, 2).nbytes == 16 * (64 + 48) * 4
    assert cost.fused_work([sizes[0]._replace(weight_itemsize=4)], 1, 2, second_pass=True).nbytes == 16 * (64 + 48) * 4


def test_a_batch_reads_each_expert_once():
    one = cost.fused_work(llama_2_7b(64), 2, 8)
    seen = [cost.fused_work(llama_2_7b(64), 2, 8, tokens).nbytes / one.nbytes for tokens in (1, 2, 4, 8, 16, 1000)]
    assert seen[0] == 1 and seen[1] == pytest.approx(1.75) and seen[-1] == pytest.approx(4)  # 4: all eight, where a token reads two
    assert cost.distinct_experts(8, 2, 1) == 2 and cost.distinct_experts(8, 8, 5) == 8
    assert sorted(seen) == seen and cost.fused_work(llama_2_7b(64), 2, 8, 16).flops == 16 * one.flops


def test_seconds_of_work():
    rates = Rates(2.0, 10.0, 0.5)
    assert Work(4, 10, 0).seconds(rates) == 2.0  # the traffic is the longer
    assert Work(4, 40, 0).seconds(rates) == 4.0
    assert Work(4, 40, 3).seconds(rates) == 5.5


def test_crossover_divides_a_switch_by_a_token(subject):
    weights, bank = subject
    found = fm.crossover(weights, bank, 2, rates=RATES)
    sizes = cost.target_sizes(weights, bank)
    assert found.switch == cost.switch_work(sizes, 2) and found.fused_extra == cost.fused_work(sizes, 2, 4)
    assert found.switch_seconds == found.switch.nbytes / 1e9 and found.fused_extra_seconds_per_token == found.fused_extra.nbytes / 1e9
    assert found.tokens == pytest.approx(found.switch.nbytes / found.fused_extra.nbytes)
    assert found == fm.crossover(weights, bank, 2, rates=RATES) and found != fm.crossover(weights, bank, 1, rates=RATES)
    assert fm.crossover(weights, bank, 2, mode="inplace", rates=RATES).switch_seconds > found.switch_seconds
    slow = Rates(1e9, 1e12, 1e-3)  # two launches more for each token, one for a switch
    assert fm.crossover(weights, bank, 2, rates=slow).tokens < 1
    assert fm.crossover(weights, bank, 2, rates=slow, launches=0).tokens > fm.crossover(weights, bank, 2, rates=slow, launches=1).tokens > 1


def test_without_the_extension_the_cpu_reads_weights_twice(subject, monkeypatch):
    sizes = cost.target_sizes(subject[0], subject[1])
    once = fm.crossover(*subject, 2, rates=RATES).fused_extra
    monkeypatch.setattr(backend, "extension", lambda: None)
    assert fm.crossover(*subject, 2, rates=RATES).fused_extra == cost.fused_work(sizes, 2, 4, second_pass=True) != once


def test_crossover_reads_well(subject):
    text = repr(fm.crossover(*subject, 2, rates=RATES))
    assert text.startswith("Crossover(merge where a mixture lives for more than ")
    assert " tokens: switch " in text and " ms a token (" in text and "at 1 GB/s" in text


def test_rates_are_measured_once(subject, monkeypatch):
    rates = cost.measure_rates("cpu")
    assert 1e8 < rates.bytes_per_second < 1e13 and 1e8 < rates.flops_per_second < 1e15 and 0 <= rates.launch_seconds < 0.1
    monkeypatch.setattr(cost, "_seconds", lambda *_, **__: pytest.fail("measured again"))
    assert cost.measure_rates(torch.device("cpu")) is rates
    assert fm.crossover(*subject, 2).rates is rates


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range(subject, k):
    with pytest.raises(errors.InvalidValueError, match=rf"crossover: k: expected 1 to 4 \(the bank's adapters\), got {k}"):
        fm.crossover(*subject, k, rates=RATES)


def test_what_crossover_refuses(subject):
    weights, bank = subject
    for k in (True, 2.0, None):
        with pytest.raises(errors.InvalidTypeError, match="crossover: k: expected an int"):
            fm.crossover(weights, bank, k, rates=RATES)
    with pytest.raises(errors.InvalidValueError, match='mode: expected "exact" or "inplace", got \'merged\''):
        fm.crossover(weights, bank, 2, mode="merged", rates=RATES)
    with pytest.raises(errors.UnknownNameError, match="targets: expected weights that the model has, got no w1"):
        fm.crossover({"w0": weights["w0"]}, bank, 2, rates=RATES)
    for values, kind in (
        ((0.0, 1.0, 0.0), errors.InvalidValueError),
        ((1e9, math.nan, 0.0), errors.InvalidValueError),
        ((1e9, "1", 0.0), TypeError),
    ):
        with pytest.raises(kind, match="^Rates: "):
            Rates(*values)
