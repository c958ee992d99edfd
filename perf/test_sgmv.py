"""Each token's own adapters for many tokens: `fm.lora_linear` beyond 16 tokens beside torch; its SGMV kernels beside vLLM's and SGLang's.

Two questions. The whole linear, two gated experts per token, beside F.linear alone and torch's loops: tokens, adapters, ranks and the five
popularity mixes, each changed alone. And, on a GPU, the adapters alone (y += B A x, one un-gated adapter per token, which is all that the
peers do): tokens, adapters and ranks, and mixes, every way in a CUDA graph over buffers that rotate, tokens sorted by adapter beforehand.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from fusedmerge.backend import backends, choose
from fusedmerge.backend.sgmv import Target, add_to_targets, group_tokens
from perf import linears, model
from perf.backbones import LLAMA_2_7B
from perf.evidence import Suite
from perf.linears import GATHERED_BYTES, POPULARITIES, Problem
from perf.model import Ceilings, Cost
from perf.peers import PEERS, Absent, Peer
from perf.subjects import backbones
from perf.timing import chained, device, in_turn, median_ratio, rotated

WHERE = device()
GPU = WHERE.type == "cuda"
MAIN = backbones(WHERE)[0]
ROWS, COLS = MAIN.intermediate, MAIN.hidden
SECONDS, PEER_SECONDS = 0.4, 0.15  # of rounds per point
TITLES = {
    "fused": "fm.lora_linear",
    "linear": "F.linear alone",
    "grouped": "F.linear + a loop over adapters",
    "gathered": "F.linear + gathered factors",
}
ADAPTERS_ALONE, OURS = "adapters alone", "fusedmerge SGMV"
Calls = dict[str, Callable[[int], Any]]


class Point(NamedTuple):
    """One point of a sweep."""

    axis: str
    x: float
    tokens: int = 2048 if GPU else 64
    num_adapters: int = 8
    r: int = 16
    popularity: str = "uniform"


TOKENS = (17, 32, 64, 512, 2048, 8192) if GPU else (17, 64, 256)
SWEEPS = [
    *(Point("tokens (T)", tokens, tokens=tokens) for tokens in TOKENS),
    *(Point("adapters (N)", count, num_adapters=count) for count in (1, 8, 64)),
    *(Point("rank (r)", r, r=r) for r in (8, 16, 64, 128)),
]


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> Iterator[None]:
    point = Point("", 0)
    suite.setting["text"] = (
        f"A linear of {MAIN.name}, [{ROWS}, {COLS}] in bfloat16; unless a row says otherwise {point.tokens} tokens, "
        f"{point.num_adapters} adapters of rank {point.r}, two experts per token, drawn uniformly"
        + ("; every way in a CUDA graph" if GPU else "")
    )
    with torch.no_grad():
        yield


def timed(benchmark: Any, calls: Calls, sets: int, rounds: int, seconds: float = SECONDS) -> dict[str, list[float]]:
    """Seconds of one call of each."""
    chains, count = chained(calls, sets, WHERE)
    return {name: [s / count for s in taken] for name, taken in in_turn(benchmark, chains, WHERE, rounds, seconds).items()}


def whole(benchmark: Any, problem: Problem, rounds: int) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """(samples, errors) of the whole linear by every way, checked."""
    weight_of = rotated(lambda seed: linears.make_weight(ROWS, COLS, WHERE, seed), 2 * ROWS * COLS, WHERE)
    loop = linears.grouped(problem)
    calls: Calls = {
        "fused": lambda number: problem.fused(weight_of(number)),
        "linear": lambda number: torch.nn.functional.linear(problem.x, weight_of(number)),
        "grouped": lambda number: loop(weight_of(number)),
    }
    if problem.gathered_bytes <= GATHERED_BYTES:
        calls["gathered"] = lambda number: problem.gathered(weight_of(number))
    weight = weight_of(0)
    error = {"fused": linears.check(problem.fused(weight), weight, problem)}
    for name in set(calls) - {"fused", "linear"}:  # each adapter's part is rounded, and added to a rounded sum
        error[name] = linears.check(calls[name](0), weight, problem, ("y", "y", "plain", "z", "z"))
    return timed(benchmark, calls, len(weight_of), rounds), error


@pytest.mark.parametrize("point", SWEEPS, ids=lambda point: f"{point.axis[-2]}={point.x}")
def test_whole(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, point: Point) -> None:
    """One point: the linear with its adapters beside torch."""
    problem = linears.make(ROWS, COLS, point.tokens, point.num_adapters, point.r, 2, WHERE, point.popularity)
    samples, error = whole(benchmark, problem, rounds)
    costs = {"fused": problem.whole, "linear": problem.alone}
    for name, taken in samples.items():
        record(
            suite, ceilings, f"{name}, {point.axis} = {point.x}", f"time against {point.axis}", f"{TITLES[name]}, {point.axis} = {point.x}",
            taken, costs.get(name), ratio=median_ratio(taken, samples["linear"]), compared_to=TITLES["linear"], error=error.get(name),
            x=point.x, axis=point.axis, series=TITLES[name],
        )  # fmt: skip


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, popularity: str) -> None:
    """64 adapters, chosen in five ways."""
    problem = linears.make(ROWS, COLS, Point("", 0).tokens, 64, 16, 2, WHERE, popularity)
    samples, error = whole(benchmark, problem, rounds)
    costs = {"fused": problem.whole, "linear": problem.alone}
    for name, taken in samples.items():
        record(
            suite, ceilings, f"{name}, {popularity}", "64 adapters, by popularity", f"{popularity}: {TITLES[name]}", taken, costs.get(name),
            ratio=median_ratio(taken, samples["linear"]), compared_to=TITLES["linear"], error=error.get(name),
        )  # fmt: skip


def record(suite: Suite, ceilings: Ceilings, name: str, group: str, title: str, taken: list[float], cost: Cost | None, **more: Any) -> None:
    """A case, with what the model says of its cost where there is one."""
    known = {} if cost is None else {
        "bytes": cost.bytes, "flops": cost.flops, "launches": cost.launches, "predicted_ms": 1e3 * model.seconds(cost, ceilings),
    }  # fmt: skip
    suite.record(name, group, title, taken, **known, **more)


# ---------------------------------------------------------------------- the adapters alone, beside peers

PEER_TOKENS = (1, 16, 64, 512, 2048, 8192)
PEER_SIZES = ((8, 16), (8, 64), (64, 16), (64, 64), (1, 16), (8, 8), (8, 128))  # (N, r), most telling first


def loaded_peers(suite: Suite) -> dict[str, Peer]:
    """Peers by title; what is absent is noted with its reason."""
    found: dict[str, Peer] = {}
    for name, load in PEERS.items():
        try:
            found |= load()
        except Absent as reason:
            suite.setting.setdefault("not_measured", {})[name] = str(reason)
    return found


@pytest.fixture(scope="module")
def peers(suite: Suite) -> dict[str, Peer]:
    found = loaded_peers(suite)
    if not found:
        pytest.skip("; ".join(suite.setting["not_measured"].values()))
    return found


@pytest.mark.skipif(not GPU, reason="the kernels need a GPU: test_on_the_simulator checks this library's values")
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("tokens", PEER_TOKENS)
@pytest.mark.parametrize(("num_adapters", "r"), PEER_SIZES)
def test_beside_peers(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, peers: dict[str, Peer], num_adapters: int, r: int, tokens: int,
    popularity: str,
) -> None:  # fmt: skip
    """One point; the setting's text keeps what all points so far say together."""
    backend = choose(WHERE, "lora_linear")
    sizes = (ROWS, COLS, tokens, num_adapters, r, 1, WHERE, popularity, False)
    first = linears.make(*sizes)
    error = checked(first, beside(first, peers, backend))
    sets = rotated(lambda seed: beside(linears.make(*sizes, seed), peers, backend), first.added.bytes, WHERE)
    calls: Calls = {title: lambda number, title=title: sets(number).calls[title]() for title in sets(0).calls}
    samples = timed(benchmark, calls, len(sets), rounds, PEER_SECONDS)
    better = min(peers, key=lambda title: statistics.median(samples[title]))
    name = f"N = {num_adapters}, r = {r}, {popularity}"
    for title, taken in samples.items():
        other = better if title == OURS else OURS
        record(
            suite, ceilings, f"{title}, {name}, T = {tokens}", f"{ADAPTERS_ALONE}, {name}", f"{title}, T = {tokens}", taken,
            first.added if title == OURS else None, ratio=median_ratio(taken, samples[other]), better_peer=better,
            compared_to="the better peer" if title == OURS else OURS, error=error[title], x=tokens, axis="tokens (T)", series=title,
        )  # fmt: skip
    suite.setting["summary"] = found = summary(suite.cases)
    suite.setting["text"] = f"{suite.setting['text'].partition('. Adapters')[0]}. Adapters alone: {found['text']}"


class Beside(NamedTuple):
    """One set of buffers: each way adds to a y of its own."""

    before: torch.Tensor
    ys: dict[str, torch.Tensor]
    calls: dict[str, Callable[[], None]]


def beside(problem: Problem, peers: dict[str, Peer], backend: str) -> Beside:
    """Ours and the peers', tokens sorted by adapter."""
    groups = group_tokens(backend, problem.ids, problem.gates, len(problem.a))

    def ours(y: torch.Tensor) -> None:
        add_to_targets(backend, problem.x, [Target(y, problem.a, problem.b)], groups)

    ids = problem.ids[:, 0].contiguous()
    adders = {OURS: ours, **{title: prepare(problem.x, problem.a, problem.b, ids) for title, prepare in peers.items()}}
    generator = torch.Generator(problem.x.device).manual_seed(1)
    before = problem.x.new_empty(len(problem.x), problem.b.shape[1]).normal_(generator=generator)
    ys = {title: before.clone() for title in adders}
    return Beside(before, ys, {title: functools.partial(add, ys[title]) for title, add in adders.items()})


def checked(problem: Problem, found: Beside) -> dict[str, dict[str, float]]:
    """Every way's error at its first call. Raises AssertionError where one is out of bounds."""
    error = {}
    for title, call in found.calls.items():
        call()
        error[title] = linears.check_added(found.ys[title], found.before, problem, ("y",) if title == OURS else ("y", "z"))
    return error


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The better peer's time over ours at every point: geometric mean and least."""
    ahead = [1 / case["ratio"] for case in cases if case["group"].startswith(ADAPTERS_ALONE) and case["series"] == OURS]
    mean, least = math.exp(statistics.fmean(map(math.log, ahead))), min(ahead)
    text = f"the better peer takes {mean:.2f} times as long as {OURS} (geometric mean of {len(ahead)} points; least: {least:.2f})"
    return {"geometric_mean": mean, "least": least, "points": len(ahead), "text": text}


@pytest.mark.skipif(GPU, reason="the kernels themselves run here")
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_on_the_simulator(popularity: str) -> None:
    """The SGMV kernels' sources on the host simulator, on a tiny linear: values, no times."""
    if not backends()["sim"]:
        pytest.skip(backends()["sim"].reason)
    tiny = LLAMA_2_7B.scaled(64, 1)
    problem = linears.make(tiny.intermediate, tiny.hidden, 19, 3, 16, 1, WHERE, popularity, gates=False)
    checked(problem, beside(problem, {}, "sim"))
