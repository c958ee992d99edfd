"""The paper's ablations of latency (arXiv 2405.17741): what routing once per token, the one-launch switch, the rank, N and k each cost.

A suite like the others (`pytest perf/ablations.py`; `make bench` collects it): layer-wise and token-wise routing, each with a simple merge,
a switch and fused application; then rank, number of experts and experts per token, merged and fused. Always the reference decoder beside
its own backbone, in turn; logits are compared with float64 truth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import fusedmerge as fm
from fusedmerge.commands.demo_decode import Run
from fusedmerge.moe.decoder import Decoder
from fusedmerge.moe.experts import ExpertSet
from fusedmerge.moe.session import DecoderSession
from fusedmerge.moe.strategies import Fused, one_route
from perf import model
from perf.backbones import LLAMA_2_7B
from perf.decoding import EXPERTS, TOP_K, Row, Workbench, decoding, lengths, queries, step_cost, workbench
from perf.evidence import Suite
from perf.model import Ceilings
from perf.timing import device, median_ratio

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = device()
GPU = WHERE.type == "cuda"
BACKBONE = LLAMA_2_7B if GPU else LLAMA_2_7B.scaled(384, 4)
QUERIES, LONGEST, NEW_TOKENS, RANK = (50, 1024, 16, 64) if GPU else (50, 48, 6, 16)
SECONDS = 0.4  # of rounds per point
BY_LAYER = {"num_experts": EXPERTS, "r": RANK}
ROUTING = [
    Row("layer-wise + simple merge", "mola", "merged-simple", capture=GPU, config=BY_LAYER),
    Row("layer-wise + switch, a launch per layer", "mola", "layer-switch", capture=GPU, config=BY_LAYER),
    Row("layer-wise, fused", "mola", "fused", capture=GPU, config=BY_LAYER),
    Row("token-wise + simple merge", "lora_switch", "merged-simple", capture=GPU, config={"r": RANK}),
    Row("token-wise + switch", "lora_switch", "merged", capture=GPU, config={"r": RANK}),
    Row("token-wise, fused", "lora_switch", "fused", capture=GPU, config={"r": RANK}),
]
SWEEPS = [
    *(("rank (r)", r, {"r": r}) for r in (64, 128)),
    *(("experts (N)", count, {"r": RANK, "num_experts": count}) for count in (4, 8, 16)),
    *(("experts per token (k)", k, {"r": RANK, "top_k": k}) for k in (1, 2, 4)),
]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return workbench(BACKBONE, WHERE)


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> Iterator[None]:
    suite.setting["text"] = (
        f"{BACKBONE.name} in bfloat16, batch 1, the reference decoder" + (", its step in a CUDA graph" if GPU else "") + "; unless a row "
        f"says otherwise {EXPERTS} experts of rank {RANK}, top-{TOP_K}, on all linears"
    )  # fmt: skip
    with torch.no_grad():
        yield


class LayerSwitch(Fused):
    """A Switcher for each router's linears, switched where the router is met: one launch per layer and token."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.switchers: dict[str | None, fm.Switcher] = {}
        for router in dict.fromkeys(linear.router for linear in self.experts.linears.values()):
            own = {name: linear for name, linear in self.experts.linears.items() if linear.router == router}
            bank = ExpertSet("lora_switch", own, self.experts.routers).make_bank()
            self.switchers[router] = fm.Switcher({name: decoder.weights[name] for name in own}, bank)

    def project(self, x: torch.Tensor, names: Sequence[str]) -> Sequence[torch.Tensor]:
        router = self.experts.linears[names[0]].router
        if router not in self.chosen:
            self.switchers[router].switch(*one_route(*self.route(router, x), "merged"))
        return self.decoder.linears(x, names)

    def restore(self) -> None:
        for switcher in self.switchers.values():
            switcher.restore()

    def close(self) -> None:
        for switcher in self.switchers.values():
            switcher.close()


class LayerSwitchRun(Run):
    """Decodes by `LayerSwitch`."""

    def open(self, capacity: int, batch: int = 1) -> Any:
        session = DecoderSession(self.model, "fused", batch, capacity, capture=self.capture)  # whose prefill stays un-merged
        session._decode = LayerSwitch(self.model)
        return session


def run_of(bench: Workbench, row: Row) -> Run:
    """A row's model: for MoLA's experts, one router for each layer, at its q_proj (MoRAL's routing)."""
    if row.method != "mola":
        return bench.run(row)
    found = bench.run(replace(row, strategy="fused"))
    decoder = copy.copy(found.model)
    linears = {}
    for name, linear in decoder.experts.linears.items():
        layer = ".".join(name.split(".")[:3])
        linears[name] = replace(linear, router=decoder.experts.linears[f"{layer}.self_attn.q_proj.weight"].router)
    asked = {linear.router: decoder.experts.routers[linear.router] for linear in linears.values()}
    decoder.experts = ExpertSet("mola", linears, asked)
    kind = LayerSwitchRun if row.strategy == "layer-switch" else Run
    return kind(found.engine, row.method, row.strategy, decoder, row.capture)


def measured(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, rows: Sequence[Row], new_tokens: int,
    place: dict[str, Any],
) -> None:  # fmt: skip
    """Decode by every row and by the backbone in turn, and record each."""
    errors = {row.title: bench.checked(row, run_of) for row in rows}
    runs = {**{row.title: run_of(bench, row) for row in rows}, "backbone": bench.run(rows[0].backbone)}
    count = new_tokens or NEW_TOKENS
    prompts = lengths(rounds or QUERIES, 4, LONGEST)
    capacity = max(prompts) + count
    samples, launches = decoding(benchmark, runs, queries(bench, prompts, count), capacity, count, WHERE, rounds, SECONDS)
    for row in rows:
        title = f"{row.title}, {place['axis']} = {place['x']}" if "x" in place else row.title
        group = f"a token against {place['axis']}" if "x" in place else "routing and merging"
        cost = step_cost(BACKBONE, row, capacity)
        known = {} if cost is None else {"bytes": cost.bytes, "flops": cost.flops, "predicted_ms": 1e3 * model.seconds(cost, ceilings)}
        suite.record(
            title, group, title, samples[row.title], ratio=median_ratio(samples[row.title], samples["backbone"]), compared_to="backbone",
            counted_launches=launches[row.title], error=errors[row.title], **known, **({"series": row.title, **place} if place else {}),
        )  # fmt: skip


@pytest.mark.parametrize("row", ROUTING, ids=lambda row: row.title.replace(" ", "_"))
def test_routing(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, row: Row, pytestconfig: pytest.Config
) -> None:
    """Layer-wise or token-wise; simple merge, switch or fused."""
    measured(benchmark, suite, ceilings, rounds, bench, [row], pytestconfig.getoption("--new-tokens"), {})


@pytest.mark.parametrize(("axis", "x", "config"), SWEEPS, ids=lambda value: str(value) if isinstance(value, (int, str)) else "")
def test_sizes(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, axis: str, x: int, config: dict[str, int],
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """One size changed: switch and fused."""
    rows = [
        Row(title, "lora_switch", strategy, capture=GPU, config=config)
        for title, strategy in (("token-wise, fused", "fused"), ("token-wise + switch", "merged"))
    ]
    measured(benchmark, suite, ceilings, rounds, bench, rows, pytestconfig.getoption("--new-tokens"), {"x": x, "axis": axis})
