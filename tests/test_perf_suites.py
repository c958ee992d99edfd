"""The suites of fused application at toy size: they run, a wrong result fails them, an absent peer is told by its reason."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fusedmerge.commands.plot_tables import group_markdown, groups_of
from perf import ablations, linears, peers, timing
from perf import test_lora_linear as linear_suite
from perf import test_sgmv as sgmv_suite
from perf.evidence import Suite
from tests.perf_kit import CEILINGS, CPU, Benchmark

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for suite in (linear_suite, sgmv_suite):
        monkeypatch.setattr(suite, "WHERE", CPU)
        monkeypatch.setattr(suite, "ROWS", 40)
        monkeypatch.setattr(suite, "COLS", 24)
        monkeypatch.setattr(suite, "SECONDS", 0.0)
        monkeypatch.setattr(suite, "rotated", lambda make, *_: timing.rotated(make, 1 << 50, CPU))
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------- one linear


@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_a_wrong_y_is_noticed(tokens):
    problem = linears.make(40, 24, tokens, 5, 16, 2, CPU)
    weight = linears.make_weight(40, 24, CPU)
    y = problem.fused(weight)
    assert linears.check(y, weight, problem)["of_bound"] <= 1
    for t in {0, tokens - 1}:
        wrong = y.clone()
        wrong[t, 7] += 0.02 * wrong[t].float().norm() / 40**0.5
        with pytest.raises(AssertionError, match="times the bound"):
            linears.check(wrong, weight, problem)
    y[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="inf times the bound"):
        linears.check(y, weight, problem)


def test_an_expert_less_is_noticed():
    problem = linears.make(40, 24, 19, 5, 16, 2, CPU)
    weight, less = linears.make_weight(40, 24, CPU), problem.ids.clone()
    less[3, 1] = -1
    partial = linears.Problem(problem.x, problem.a, problem.b, less, problem.gates)
    linears.check(partial.fused(weight), weight, partial)
    with pytest.raises(AssertionError):
        linears.check(partial.fused(weight), weight, problem)
    with pytest.raises(AssertionError):
        linears.check(partial.fused(weight), weight, problem, ("y", "y", "plain", "z", "z"))  # as wide as any way's bound


def test_popularity_mixes():
    counts = {}
    for name in linears.POPULARITIES:
        ids = linears.routes(name, 4000, 8, 2)
        assert ids.shape == (4000, 2) and ids.dtype == torch.int32
        assert (ids[:, 0] != ids[:, 1]).all() and ids.min() >= 0 and ids.max() <= 7
        assert torch.equal(ids, linears.routes(name, 4000, 8, 2))
        counts[name] = torch.bincount(linears.routes(name, 4000, 8, 1).flatten(), minlength=8).tolist()
    assert counts["distinct"] == [500] * 8 and counts["identical"] == [4000, *[0] * 7]
    assert all(400 < count < 600 for count in counts["uniform"])
    assert 1900 < counts["skewed"][0] < 2100 and max(counts["skewed"][1:]) < 400
    assert counts["zipf"][0] > 1.7 * counts["zipf"][1] > 2 * counts["zipf"][3] > counts["zipf"][7] > 100
    assert linears.routes("uniform", 5, 1, 2).tolist() == [[0]] * 5


def spoil(monkeypatch):
    right = linears.fm.lora_linear

    def wrong(*arguments):
        y = right(*arguments)
        y[-1, -1] += 0.05 * (1 + y[-1, -1].abs())
        return y

    monkeypatch.setattr(linears.fm, "lora_linear", wrong)


def test_the_linear_suite(monkeypatch):
    suite = Suite("lora_linear")
    linear_suite.test_tokens(Benchmark(), suite, CEILINGS, 1, 16, 2, 4)
    linear_suite.test_one_route(Benchmark(), suite, CEILINGS, 1)
    titles = [case["title"] for case in suite.cases]
    assert len(titles) == 8 and "fm.lora_linear, no adapter active" in titles and "F.linear, merged weights" in titles
    fused = suite.cases[0]
    assert fused["x"] == 4 and fused["error"]["of_bound"] <= 1
    experts = linears.make(40, 24, 4, 8, 16, 2, CPU).experts
    assert fused["bytes"] == 2 * (40 * 24 + 4 * 24 + 4 * 40 + experts * 16 * 64)
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        linear_suite.test_tokens(Benchmark(), suite, CEILINGS, 1, 16, 2, 4)


def test_the_many_token_suite(monkeypatch):
    suite = Suite("sgmv")
    sgmv_suite.test_whole(Benchmark(), suite, CEILINGS, 1, sgmv_suite.Point("tokens (T)", 33, tokens=33))
    assert [case["series"] for case in suite.cases] == list(sgmv_suite.TITLES.values())
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        sgmv_suite.test_popularity(Benchmark(), suite, CEILINGS, 1, "zipf")


# ---------------------------------------------------------------------- peers


def stand_in(factor=1.0):
    """In place of kernels: (group_tokens, add_to_targets)."""

    def add(_backend, x, targets, groups):
        for target in targets:
            slots = groups[:, 0].long()
            delta = target.b[slots].double() @ (target.a[slots].double() @ x.double()[:, :, None])
            target.y.copy_((target.y.double() + factor * delta.squeeze(-1)).to(target.y.dtype))

    return (lambda _backend, ids, gates, count: ids), add


def peer(factor=1.0):
    add = stand_in(factor)[1]
    return lambda x, a, b, ids: lambda y: add("", x, [sgmv_suite.Target(y, a, b)], ids[:, None])


def test_beside_a_peer(monkeypatch):
    group, add = stand_in()
    monkeypatch.setattr(sgmv_suite, "group_tokens", group)
    monkeypatch.setattr(sgmv_suite, "add_to_targets", add)
    monkeypatch.setattr(sgmv_suite, "choose", lambda *_: "none")
    suite = Suite("sgmv")
    suite.setting["text"] = "A linear"
    for tokens in (3, 19):
        sgmv_suite.test_beside_peers(Benchmark(), suite, CEILINGS, 2, {"one": peer(), "two": peer()}, 4, 16, tokens, "zipf")
    ours = [case for case in suite.cases if case["series"] == sgmv_suite.OURS]
    mean = math.exp(sum(-math.log(case["ratio"]) for case in ours) / 2)
    assert suite.setting["summary"]["geometric_mean"] == pytest.approx(mean) and suite.setting["summary"]["points"] == 2
    assert suite.setting["text"].startswith("A linear. Adapters alone: the better peer takes")
    with pytest.raises(AssertionError):
        sgmv_suite.test_beside_peers(Benchmark(), suite, CEILINGS, 2, {"one": peer(1.2)}, 4, 16, 3, "zipf")
    monkeypatch.setattr(sgmv_suite, "add_to_targets", stand_in(0.98)[1])
    with pytest.raises(AssertionError):
        sgmv_suite.test_beside_peers(Benchmark(), suite, CEILINGS, 2, {"one": peer()}, 4, 16, 3, "zipf")


@pytest.fixture
def triton(monkeypatch):
    for name in ("triton", "triton.language"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["triton"].language = sys.modules["triton.language"]
    sys.modules["triton"].next_power_of_2 = lambda n: 1 << (n - 1).bit_length()


def test_absent_peers_are_told_by_reason(monkeypatch, tmp_path, request):
    suite = Suite("sgmv")
    if importlib.util.find_spec("triton") is None:
        assert sgmv_suite.loaded_peers(suite) == {}
        assert suite.setting["not_measured"] == dict.fromkeys(("vllm", "sglang"), "Triton is not installed")
    request.getfixturevalue("triton")
    for name in ("VLLM", "SGLANG"):
        monkeypatch.setenv(f"FUSEDMERGE_{name}_PATH", str(tmp_path))
    with pytest.raises(peers.Absent, match="FUSEDMERGE_VLLM_PATH is .* where no vllm/ is"):
        peers.vllm()
    (tmp_path / "sglang").mkdir()
    with pytest.raises(peers.Absent, match=r"chunked_sgmv_shrink\.py is missing"):
        peers.sglang()
    if importlib.util.find_spec("vllm") is None:
        monkeypatch.delenv("FUSEDMERGE_VLLM_PATH")
        with pytest.raises(peers.Absent, match="vllm is not installed; FUSEDMERGE_VLLM_PATH may name"):
            peers.vllm()


SHRINK = """
from vllm import envs
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op
assert not envs.VLLM_ANYTHING
def _lora_shrink(x, a, z, ids, scaling):
    z[0] = scaling * (a[0][ids.long()].float() @ x.float()[:, :, None])[..., 0]
try:
    direct_register_custom_op(op_name="lora_shrink")
except AttributeError:
    lora_shrink = _lora_shrink
"""
EXPAND = """
from vllm.lora.ops.triton_ops.lora_shrink_op import lora_shrink
def lora_expand(z, b, y, ids, offset_start, add_inputs):
    y += (b[0][ids.long()].float() @ z[0][:, :, None])[..., 0].to(y.dtype)
"""
META = """
class LoRAKernelMeta:
    @staticmethod
    def make(loras, tokens, device):
        return LoRAKernelMeta()
    def prepare_tensors(self, ids):
        self.ids = ids
    def meta_args(self, tokens):
        return (self.ids,)
"""


def test_a_peer_is_loaded_from_a_path(monkeypatch, tmp_path, triton):
    """A package of the same names and signatures: its files are loaded alone, and nothing of it stays behind."""
    package = tmp_path / "vllm" / "lora" / "ops" / "triton_ops"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('the package itself must not be imported')")
    for leaf, text in (("kernel_utils", ""), ("utils", "from vllm.logger import init_logger\ninit_logger('a').warning_once('b')"),
                       ("lora_shrink_op", SHRINK), ("lora_expand_op", EXPAND), ("lora_kernel_metadata", META)):  # fmt: skip
        (package / f"{leaf}.py").write_text(text)
    monkeypatch.setenv("FUSEDMERGE_VLLM_PATH", str(tmp_path))
    there = types.ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", there)
    [(title, prepare)] = peers.vllm().items()
    problem = linears.make(40, 24, 9, 4, 16, 1, CPU, gates=False)
    before = torch.randn(9, 40).bfloat16()
    y = before.clone()
    prepare(problem.x, problem.a, problem.b, problem.ids[:, 0])(y)
    assert title == "vLLM" and linears.check_added(y, before, problem, ("y", "z"))["of_bound"] <= 1
    assert [module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"] == [there]
    (package / "lora_expand_op.py").write_text("from vllm.somewhere import anything")
    with pytest.raises(peers.Absent, match=r"lora_expand_op\.py cannot be loaded alone: ModuleNotFoundError"):
        peers.vllm()


INTERPRETED = """
import dataclasses
import torch
from perf import linears, peers
for tokens, adapters, popularity in ((5, 3, "zipf"), (40, 4, "uniform"), (70, 1, "identical")):
    problem = linears.make(96, 512, tokens, adapters, 16, 1, torch.device("cpu"), popularity, gates=False)
    problem = dataclasses.replace(problem, x=problem.x.half(), a=problem.a.half(), b=problem.b.half())
    before = torch.randn(tokens, 96).half()
    for load in peers.PEERS.values():
        for title, prepare in load().items():
            y = before.clone()
            prepare(problem.x, problem.a, problem.b, problem.ids[:, 0].contiguous())(y)
            print(title, linears.check_added(y, before, problem, ("y", "z")))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(not {"FUSEDMERGE_VLLM_PATH", "FUSEDMERGE_SGLANG_PATH"} <= set(os.environ), reason="no paths of the peers are given")
def test_the_peers_themselves():
    """Their own files, in Triton's interpreter (whose tl.dot does not know bfloat16)."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["vLLM", "SGLang,", "SGLang,"] * 3


def test_segments_of_one_adapter():
    ids = torch.tensor([2, 0, 2, 2, 0, 1], dtype=torch.int32).repeat(6)
    found = peers._segments(ids, torch.zeros(3, 16, 4), longest=16)
    starts = found.seg_indptr.tolist()
    assert found.max_len == 16 and found.num_segments == len(starts) - 1 == 4
    assert found.weight_indices.tolist() == [0, 1, 2, 2] and starts == [0, 12, 18, 34, 36]
    for begin, end, adapter in zip(starts, starts[1:], found.weight_indices.tolist(), strict=False):
        assert (ids[found.permutation[begin:end].long()] == adapter).all()


# ---------------------------------------------------------------------- around them


@pytest.mark.parametrize(("sets", "count"), [(3, 16), (20, 20)])
def test_a_graph_holds_a_call_for_each_set_of_buffers(monkeypatch, sets, count):
    monkeypatch.setattr(timing, "replayed", lambda call: call)
    seen = []
    chains, found = timing.chained({"a": seen.append}, sets, types.SimpleNamespace(type="cuda"))
    chains["a"](7)
    assert found == count and seen == list(range(count))
    assert timing.chained({"a": seen.append}, sets, CPU)[1] == 1


def test_tables_of_these_suites():
    suite = Suite("decode")
    more = {"counted_launches": 7, "memory_bytes": 5e9, "error": {"max_error": 0.1, "of_backbone": 1.25}, "compared_to": "backbone"}
    suite.record("a", "eager", "MoLA", [0.002], ratio=2.5, **more)
    for x in (1, 2):
        suite.record(f"b {x}", "r = 16, top-2", f"ours {x}", [0.001], x=x, axis="tokens (T)", series="ours")
    tables = [group_markdown(*group) for group in groups_of({"cases": suite.cases}).items()]
    assert "| MoLA | 2.00 ms | 2.50x | 1.25 | 7 | 5.00 GB |" in tables[0]
    assert "mean error / backbone's | kernels | memory |" in tables[0]
    assert tables[1].startswith("| r = 16, top-2: tokens (T) | ours |")


@pytest.mark.slow
def test_the_ablations_are_collected_once():
    command = [sys.executable, "-m", "pytest", "perf", "--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "routing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("perf/ablations.py::")]
    assert len(found) == len(set(found)) == len(ablations.ROUTING), done.stdout + done.stderr
