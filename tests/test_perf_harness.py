"""The benchmarks' own tools: rounds that take turns, buffers that rotate, results that are written only where nothing is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from perf import evidence, rivals, subjects, timing
from perf.backbones import LLAMA_2_7B

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Benchmark:
    """pytest-benchmark's pedantic, without its report."""

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            arguments, keywords = setup()
            target(*arguments, **keywords)


def test_calls_take_turns():
    made = []

    def call(name):
        return lambda number: made.append((name, number))

    samples = timing.in_turn(Benchmark(), {name: call(name) for name in "abc"}, CPU, rounds=4, before={"b": call("before b")})
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [[name for name, number in made if number == n] for n in range(6)]
    assert [sorted(names) for names in rounds] == [["a", "b", "before b", "c"]] * 6
    assert all(names.index("b") == names.index("before b") + 1 for names in rounds)
    assert len({tuple(names) for names in rounds[2:]}) > 1  # the order changes


def test_rounds_fit_the_time():
    assert [timing.rounds_within(2.0, each) for each in (10.0, 0.2, 1e-9)] == [timing.LEAST_ROUNDS, 10, timing.MOST_ROUNDS]
    slow = timing.in_turn(Benchmark(), {"a": lambda _: None}, CPU, seconds=0.0)
    assert len(slow["a"]) == timing.LEAST_ROUNDS


def test_buffers_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1000)
    pick = timing.rotated(lambda index: index, 900.0, CPU)
    assert [pick(number) for number in range(7)] == [0, 1, 2, 3, 4, 0, 1]  # five of 900 bytes are more than four caches of 1000
    assert [timing.rotated(lambda index: index, 5000.0, CPU)(number) for number in range(3)] == [0, 0, 0]
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1 << 40)
    assert max(map(timing.rotated(lambda index: index, 1.0, CPU), range(200))) == timing.MOST_SETS - 1


def test_a_copy_moves_its_traffic(monkeypatch):
    monkeypatch.setattr(rivals, "COPY_BYTES", 100)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, source: copied.append(into.nbytes + source.nbytes))
    rivals.copy_of(501, CPU)(None)
    assert copied == [200, 200, 100]


def test_the_check_notices_a_wrong_weight():
    weights = subjects.make_weights(LLAMA_2_7B.scaled(64, 1), CPU)
    bank = subjects.make_bank(weights, 3, 4)
    mixture = subjects.mixtures(bank.names, 2)[0]
    other = {name: tensor.clone() for name, tensor in weights.items()}
    for way in (rivals.addmm_float32(weights, other, bank), rivals.Addmm(weights, other, bank, 2)):
        way(mixture)
        assert subjects.errors(other, weights, bank, mixture)["of_rounding"] < 1.5
    rivals.addmm_float32(weights, other, bank)(mixture)
    subjects.checked(other, weights, bank, mixture, rows=None)
    next(iter(other.values()))[-1, 3] += 0.25
    with pytest.raises(AssertionError, match="times the bound"):
        subjects.checked(other, weights, bank, mixture)  # the last row is always looked at
    with pytest.raises(AssertionError, match="times the bound"):
        subjects.checked(weights, weights, bank, mixture)


FAKE = """
import pytest
from perf.model import Ceilings

@pytest.fixture(scope="session")
def ceilings():
    return Ceilings(1e9, 1e9, 1e9, 1e9)

def test_first(suite):
    suite.record("one", "group", "One", [0.001, 0.003, 0.002], predicted_ms=1.0)

def test_second(suite):
    suite.record("two", "group", "Two", [0.001])
    SECOND

def test_third(suite):
    suite.record("three", "group", "Three", [0.001])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "options", "cases"),
    [
        ("pytest.skip('not here')", (), ["one", "two", "three"]),
        ("assert False", (), ["one", "two", "three"]),
        ("pass", ("--budget", "0"), None),
    ],
)
def test_results_are_written_and_are_no_evidence_where_something_is_wrong(tmp_path, second, options, cases):
    (tmp_path / "test_fake.py").write_text(FAKE.replace("SECOND", second))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "perf.conftest", "-p", "no:cacheprovider", f"--results={tmp_path}", *options]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (second == "assert False"), done.stdout
    written = list((tmp_path / evidence.device_name()).glob("*"))
    if cases is None:
        assert not written and "3 skipped" in done.stdout
        return
    (path,) = written
    assert path.name == ("fake.failed" if done.returncode else "fake.json") and ("(a test has failed)" in done.stdout) == done.returncode
    found = json.loads(path.read_text())
    assert [case["name"] for case in found["cases"]] == cases
    assert found["cases"][0] | {"samples_ms": [1.0, 3.0, 2.0], "median_ms": 2.0} == found["cases"][0]
    assert found["suite"] == "fake" and found["driver"] is None and found["versions"]["torch"] == torch.__version__
    assert "One" in done.stdout and "2.00" in done.stdout  # measured / predicted


def test_a_gpu_is_described(monkeypatch, tmp_path):
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(evidence, "_run", lambda *command: "580.1" if "driver_version" in str(command) else "abc")
    suite = evidence.Suite("switch")
    suite.record("one", "group", "One", [0.001])
    path = evidence.write(suite, tmp_path, evidence.begin())
    assert path == tmp_path / "nvidia-h200" / "switch.json"
    found = json.loads(path.read_text())
    assert (found["driver"], found["processor"], found["gpu"]["l2_bytes"]) == ("580.1", "NVIDIA H200", 50 << 20)
    assert found["git_commit"] == "abc" and {"cuda", "torch"} <= found["versions"].keys()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")
    assert evidence.device_name() == "nvidia-a100-sxm4-80gb"


def test_the_commit_of_files_without_their_repository(monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_COMMIT", "abc")
    monkeypatch.setattr(evidence, "_run", lambda *_: None)
    assert (evidence.begin()["git_commit"], evidence.begin()["git_dirty"]) == ("abc", None)
    monkeypatch.setattr(evidence, "_run", lambda *command: "def" if "rev-parse" in command else "")
    assert (evidence.begin()["git_commit"], evidence.begin()["git_dirty"]) == ("def", False)


@pytest.mark.parametrize(("num_adapters", "k"), [(2, 1), (8, 2), (5, 4)])
def test_no_mixture_follows_itself(num_adapters, k):
    names = [str(n) for n in range(num_adapters)]
    plan = subjects.mixtures(names, k, count=20)
    assert len(plan) == 20 and all(len(mixture) == k and sum(mixture.values()) == pytest.approx(1.0) for mixture in plan)
    assert all(one.keys() != other.keys() for one, other in zip(plan, [*plan[1:], plan[0]], strict=True))
