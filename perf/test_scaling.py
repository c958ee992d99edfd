"""How does a switch's time grow with bytes, layers, N, r and k?

Each sweep changes one thing. Beside each switch, in turn with it, runs a copy with its traffic; small working sets rotate over four times
the cache. Sizes are those of Llama-2-7B on a GPU, and of its small double on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

import fusedmerge as fm
from fusedmerge.commands.demo_setup import clone
from perf import model, rivals
from perf.backbones import LLAMA_2_7B, Backbone
from perf.evidence import Suite
from perf.model import Ceilings
from perf.subjects import backbones, checked, make_bank, make_weights, mixtures
from perf.timing import device, in_turn, median_ratio, rotated

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = device()
GPU = WHERE.type == "cuda"
MAIN = backbones(WHERE)[0]
HALF = replace(MAIN, layers=MAIN.layers // 2)
SECONDS = 1.0  # of rounds per point


class Point(NamedTuple):
    """One point of a sweep."""

    axis: str
    x: float
    backbone: Backbone
    num_adapters: int = 8
    r: int = 64
    k: int = 2


SWEEPS: dict[str, list[Point]] = {
    "layers": [Point("layers", layers, replace(MAIN, layers=layers)) for layers in (1, 2, 4, MAIN.layers // 2, MAIN.layers)],
    "N": [Point("adapters held (N)", n, HALF, num_adapters=n, r=16) for n in (8, 32, 128, 256)],
    "r": [Point("rank (r)", r, HALF, r=r) for r in (8, 16, 32, 64, 128, 256)],
    "k": [Point("experts of a mixture (k)", k, HALF, k=k) for k in (1, 2, 3, 4)],
    "bytes": [],
}
for width in (0.125, 0.25, 0.5, 1.0):
    scaled = LLAMA_2_7B.scaled(int(MAIN.hidden * width), MAIN.layers)
    SWEEPS["bytes"].append(Point("GB moved", model.switch_exact(scaled.shapes, 64, 2).bytes / 1e9, scaled))
POINTS = [pytest.param(point, id=f"{name}={point.x:.3g}") for name, points in SWEEPS.items() for point in points]


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> None:
    suite.setting |= {
        "text": f"{MAIN.name} (half of its layers where N, r and k change), bfloat16, exact mode; unless an axis says otherwise "
        "8 adapters of rank 64 (16 where N changes), top-2",
        "backbone": MAIN.__dict__,
    }


class Subject:
    """One set of buffers with its switcher."""

    def __init__(self, point: Point, seed: int) -> None:
        self.base = make_weights(point.backbone, WHERE, seed)
        self.live = clone(self.base)
        self.bank = make_bank(self.live, point.num_adapters, point.r, seed)
        self.switcher = fm.Switcher(self.live, self.bank, base=self.base)


@pytest.mark.parametrize("point", POINTS)
def test_switch(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, point: Point) -> None:
    """One point: the switch, and a copy with its traffic."""
    cost = model.switch_exact(point.backbone.shapes, point.r, point.k)
    subject_of = rotated(lambda index: Subject(point, index), cost.bytes, WHERE)
    copy_of = rotated(lambda _: rivals.copy_of(cost.bytes, WHERE), cost.bytes, WHERE)
    first = subject_of(0)
    plan = mixtures(first.bank.names, point.k)
    calls: dict[str, Callable[[int], Any]] = {
        "switch": lambda number: subject_of(number).switcher.switch(plan[number % len(plan)]),
        "copy": lambda number: copy_of(number)(number),
    }
    samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS)
    first.switcher.switch(plan[0])
    error = checked(first.live, first.base, first.bank, plan[0])
    series = {"switch": ("switch", cost), "copy": ("copy with its traffic", model.copy(cost.bytes))}
    record_point(suite, ceilings, point.axis, point.x, samples, series, error)


def record_point(
    suite: Suite, ceilings: Ceilings, axis: str, x: float, samples: dict[str, list[float]], series: dict[str, tuple[str, model.Cost]],
    error: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """A case per series: what is measured first, then what it is measured beside."""
    first, other = series
    for name, (label, cost) in series.items():
        suite.record(
            f"{name}, {axis} = {x:.4g}", f"time against {axis}", f"{label}, {axis} = {x:.3g}", samples[name], x=x, axis=axis, series=label,
            bytes=cost.bytes, flops=cost.flops, predicted_ms=1e3 * model.seconds(cost, ceilings),
            ratio=median_ratio(samples[name], samples[other]), compared_to=series[other][0], error=error if name == first else None,
        )  # fmt: skip
