"""Is a linear with each token's own experts as fast as the linear alone? T 1 to 16, r 8 to 64, one and two experts, differing routes.

Beside `fm.lora_linear`: F.linear alone (the backbone), F.linear and the chosen factors gathered (what un-merged torch does), and F.linear
on merged weights, which one route for all tokens allows. On a GPU a Llama-2-7B linear, every way in a CUDA graph, W rotating; on a CPU its
small double. The chain of a whole model's linears, no adapter active, is measured against the read rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from fusedmerge.backend import choose
from fusedmerge.backend.linear import Target, decode_group
from perf import linears, model
from perf.backbones import LLAMA_2_7B
from perf.evidence import Suite
from perf.linears import Problem
from perf.model import Ceilings, Cost
from perf.subjects import backbones, make_weights
from perf.timing import chained, device, in_turn, median_ratio, rotated

WHERE = device()
GPU = WHERE.type == "cuda"
MAIN = backbones(WHERE)[0]
ROWS, COLS = MAIN.intermediate, MAIN.hidden
NUM_ADAPTERS = 8
SECONDS = 0.5  # of rounds per point
TOKENS, RANKS, TOP_K = (1, 2, 4, 8, 16), (8, 16, 64), (1, 2)
TITLES = {
    "fused": "fm.lora_linear", "linear": "F.linear alone", "gathered": "F.linear + gathered factors", "merged": "F.linear, merged weights",
    "idle": "fm.lora_linear, no adapter active",
}  # fmt: skip
Calls = dict[str, Callable[[int], Any]]


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> Iterator[None]:
    suite.setting["text"] = (
        f"A linear of {MAIN.name}, [{ROWS}, {COLS}] in bfloat16, with {NUM_ADAPTERS} adapters, each token with experts of its own"
        + ("; every way in a CUDA graph" if GPU else "")
    )
    with torch.no_grad():
        yield


def run(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, calls: Calls, costs: Mapping[str, Cost], sets: int, against: str,
    error: Mapping[str, dict[str, float]], name: str, group: str, **more: Any,
) -> None:  # fmt: skip
    """Time `calls` in turn and record each."""
    timed, count = chained(calls, sets, WHERE)
    samples = {key: [s / count for s in taken] for key, taken in in_turn(benchmark, timed, WHERE, rounds, SECONDS).items()}
    for key, taken in samples.items():
        cost, median = costs.get(key), sorted(taken)[len(taken) // 2]
        known = {} if cost is None else {
            "bytes": cost.bytes, "flops": cost.flops, "launches": cost.launches, "predicted_ms": 1e3 * model.seconds(cost, ceilings),
            "fraction_of_read": cost.bytes / median / ceilings.read,
        }  # fmt: skip
        place = {"series": TITLES[key], **more} if "x" in more else {}
        title = f"{TITLES[key]}, {more['axis']} = {more['x']}" if "x" in more else TITLES[key]
        suite.record(
            f"{name}, {key}", group, title, taken, **known, **place,
            ratio=median_ratio(taken, samples[against]), compared_to=TITLES[against], error=error.get(key),
        )  # fmt: skip


def ways(problem: Problem, weight_of: Callable[[int], torch.Tensor]) -> Calls:
    return {
        "fused": lambda number: problem.fused(weight_of(number)),
        "linear": lambda number: torch.nn.functional.linear(problem.x, weight_of(number)),
        "gathered": lambda number: problem.gathered(weight_of(number)),
    }


def measure(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, problem: Problem, name: str, group: str, **more: Any) -> None:
    """A point: the three ways for differing routes, checked."""
    weight_of = rotated(lambda seed: linears.make_weight(ROWS, COLS, WHERE, seed), 2 * ROWS * COLS, WHERE)
    calls, weight = ways(problem, weight_of), weight_of(0)
    error = {
        "fused": linears.check(problem.fused(weight), weight, problem),
        "gathered": linears.check(problem.gathered(weight), weight, problem, ("y", "plain", "z")),
    }
    costs = {"fused": problem.whole, "linear": problem.alone}
    run(benchmark, suite, ceilings, rounds, calls, costs, len(weight_of), "linear", error, name, group, **more)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("r", "k"), [(16, 2), (64, 2)] if not GPU else [(r, k) for r in RANKS for k in TOP_K])
def test_tokens(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, r: int, k: int, tokens: int) -> None:
    """T tokens with routes of their own."""
    problem = linears.make(ROWS, COLS, tokens, NUM_ADAPTERS, r, k, WHERE)
    measure(
        benchmark, suite, ceilings, rounds, problem, f"r = {r}, k = {k}, T = {tokens}", f"r = {r}, top-{k}", x=tokens, axis="tokens (T)"
    )


@pytest.mark.parametrize("r", RANKS)
def test_ranks(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, r: int) -> None:
    """One token, two experts."""
    problem = linears.make(ROWS, COLS, 1, NUM_ADAPTERS, r, 2, WHERE)
    measure(benchmark, suite, ceilings, rounds, problem, f"r = {r}", "T = 1, top-2", x=r, axis="rank (r)")


def test_one_route(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int) -> None:
    """Four tokens with one route, the case that merged weights can serve (the merge itself is not in its time); and no adapter active."""
    problem = linears.make(ROWS, COLS, 4, NUM_ADAPTERS, 16, 2, WHERE, "identical")
    problem.gates.copy_(problem.gates[:1].expand_as(problem.gates))
    idle = Problem(problem.x, problem.a, problem.b, torch.full_like(problem.ids, -1), problem.gates)
    weight_of = rotated(lambda seed: linears.make_weight(ROWS, COLS, WHERE, seed), 4 * ROWS * COLS, WHERE)
    merged = [problem.merged_weight(weight_of(number)) for number in range(len(weight_of))]
    calls = ways(problem, weight_of)
    calls["merged"] = lambda number: torch.nn.functional.linear(problem.x, merged[number % len(merged)])
    calls["idle"] = lambda number: idle.fused(weight_of(number))
    weight = weight_of(0)
    error = {
        "fused": linears.check(problem.fused(weight), weight, problem),
        "gathered": linears.check(problem.gathered(weight), weight, problem, ("y", "plain", "z")),
        "merged": linears.check(torch.nn.functional.linear(problem.x, merged[0]), weight, problem, ("y", "w")),
        "idle": linears.check(idle.fused(weight), weight, idle),
    }
    costs = {"fused": problem.whole, "linear": problem.alone, "merged": problem.alone, "idle": idle.alone}
    group = "T = 4, r = 16, top-2, one route"
    run(benchmark, suite, ceilings, rounds, calls, costs, len(weight_of), "linear", error, "one route", group)


def test_chain(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int) -> None:
    """All linears of a model, one after the other, no adapter active: the fraction of the read rate, beside F.linear.

    On a GPU the decode kernels, q/k/v and gate/up grouped; on a CPU `fm.lora_linear` with empty slots.
    """
    weights = make_weights(MAIN, WHERE)
    groups = _grouped_names(weights)
    ids, gates = torch.full((1, 1), -1, dtype=torch.int32, device=WHERE), torch.ones(1, 1, device=WHERE)
    x = {cols: torch.randn(1, cols, device=WHERE).bfloat16() for cols in {weight.shape[1] for weight in weights.values()}}

    def empty(weight: torch.Tensor) -> Problem:
        rows, cols = weight.shape
        return Problem(x[cols], weight.new_zeros(1, 16, cols), weight.new_zeros(1, rows, 16), ids, gates)

    problems = {name: empty(weight) for name, weight in weights.items()}
    backend = choose(WHERE, "lora_linear") if GPU else ""

    def ours(_: int = 0) -> list[torch.Tensor]:
        if not GPU:
            return [problems[name].fused(weight) for name, weight in weights.items()]
        return [y for names in groups for y in decode_group(backend, problems[names[0]].x, [Target(weights[name]) for name in names]).ys]

    def theirs(_: int = 0) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x[weight.shape[1]], weight) for weight in weights.values()]

    found = [linears.check(y, weight, problems[name]) for y, (name, weight) in zip(ours(), weights.items(), strict=True)]
    cost = sum((model.linear(*weight.shape, 1) for weight in weights.values()), Cost(0, 0))
    launches = len(groups) if GPU else len(weights)
    costs = {"idle": Cost(cost.read, cost.written, cost.flops, launches), "linear": cost}
    error = {"idle": {"of_bound": max(error["of_bound"] for error in found)}}
    calls: Calls = {"idle": ours, "linear": theirs}
    group = f"all {len(weights)} linears of {MAIN.name}, T = 1, no adapter active"
    run(benchmark, suite, ceilings, rounds, calls, costs, 1, "linear", error, "chain", group)


def _grouped_names(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Linears that share x: q/k/v, o, gate/up, down of each layer, in the weights' order."""
    shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
    groups: dict[str, list[str]] = {}
    for name in weights:
        *place, leaf, _ = name.split(".")
        groups.setdefault(".".join([*place, shared.get(leaf, leaf)]), []).append(name)
    return list(groups.values())


@pytest.mark.skipif(GPU, reason="the kernels themselves run here")
@pytest.mark.parametrize("tokens", [1, 11])
def test_on_the_simulator(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The CUDA kernels' sources on the host simulator, on a tiny linear: values, no times."""
    from fusedmerge.backend import backends

    if not backends()["sim"]:
        pytest.skip(backends()["sim"].reason)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    tiny = LLAMA_2_7B.scaled(64, 1)
    problem = linears.make(tiny.intermediate, tiny.hidden, tokens, 3, 16, 2, WHERE)
    weight = linears.make_weight(tiny.intermediate, tiny.hidden, WHERE)
    linears.check(problem.fused(weight), weight, problem)
