"""What do dynamic adapters cost a decoded token? The paper's table (arXiv 2405.17741), batches, and where merging begins to pay.

Every method adapts the same backbone with random experts; each row decodes the same queries in turn with its backbone (the reference
decoder's, or transformers' own), prompts of ShareGPT-like lengths. On a GPU Llama-2-7B, steps eager and in a CUDA graph; on a CPU a model
of its proportions. Logits are compared with float64 truth over the same routes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

import fusedmerge as fm
from fusedmerge.commands.demo_decode import errors
from fusedmerge.moe.auto import choose
from perf import model
from perf.backbones import LLAMA_2_7B, LLAMA_3_8B, LLAMA_70B_LAYER, MISTRAL_7B, Backbone
from perf.decoding import EXPERTS, TOP_K, WORST_ERROR, Query, Row, Workbench, decoding, lengths, queries, step_cost, workbench
from perf.evidence import Suite
from perf.model import Ceilings
from perf.timing import device, in_turn, median_ratio

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = device()
GPU = WHERE.type == "cuda"
BACKBONE = LLAMA_2_7B if GPU else LLAMA_2_7B.scaled(384, 4)
QUERIES, LONGEST, NEW_TOKENS = (50, 1024, 16) if GPU else (50, 48, 6)
SECONDS = 0.4  # of rounds per row
PROMPTS = (512, 2048, 8192) if GPU else (32, 128)
OTHERS = (
    (LLAMA_3_8B, MISTRAL_7B, LLAMA_70B_LAYER)
    if GPU
    else (LLAMA_3_8B.scaled(512, 2), MISTRAL_7B.scaled(512, 2), LLAMA_70B_LAYER.scaled(1024, 1))
)
BATCHES = (1, 2, 4, 8, 16, 32, 64) if GPU else (1, 4, 16, 64)
LIFETIMES = (1, 4, 16, 64, 256) if GPU else (1, 4, 16, 64)
CLASSES = 16  # mixtures of the table
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OURS = [
    Row("backbone", "", "backbone"),
    Row("token-wise, fused", "lora_switch", "fused"),
    Row("token-wise, fused, r = 64", "lora_switch", "fused", config={"r": 64}),
    Row("token-wise + switch", "lora_switch", "merged"),
    Row("token-wise + switch, attention only", "lora_switch", "merged", config={"target_modules": ATTENTION}),
    Row("token-wise + simple merge", "lora_switch", "merged-simple"),
    Row("token-wise, auto", "lora_switch", "auto"),
    Row("token-wise, unfused", "lora_switch", "unfused"),
    Row("static LoRA, merged", "lora", "merged"),
    Row("static LoRA, unfused", "lora", "unfused"),
    Row("MoLA, r = 8, fused", "mola", "fused", config={"r": 8}),
    Row("MoLA, r = 8, unfused", "mola", "unfused", config={"r": 8}),
    Row("MixLoRA, fused", "mixlora", "fused"),
    Row("MixLoRA, unfused", "mixlora", "unfused"),
]
UNPACKED = Row("backbone, q/k/v and gate/up apart", "", "backbone", packed=False)
TRANSFORMERS = [
    Row(title, method, strategy, "transformers")
    for title, method, strategy in (
        ("backbone", "", "backbone"),
        ("MoRAL, unfused", "moral", "unfused"),
        ("MoRAL + simple merge", "moral", "merged-simple"),
        ("PESC, unfused", "pesc", "unfused"),
        ("X-LoRA, unfused", "xlora", "unfused"),
        ("MoLA, unfused", "mola", "unfused"),
        ("token-wise + simple merge", "lora_switch", "merged-simple"),
        ("token-wise + switch", "lora_switch", "merged"),
    )
]
CAPTURED = [replace(row, capture=True) for row in (*OURS, UNPACKED)] if GPU else []
EAGER = [row for row in OURS if not GPU or row.strategy not in ("fused", "auto") or row.title == "token-wise, fused"]
ROWS = [*CAPTURED, *EAGER, UNPACKED, *TRANSFORMERS]


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return workbench(BACKBONE, WHERE)


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite, request: pytest.FixtureRequest) -> Iterator[None]:
    given = request.config.getoption("--sharegpt")
    suite.setting["text"] = (
        f"{BACKBONE.name} in bfloat16, batch 1 unless a row says otherwise; {EXPERTS} experts of rank 16 unless a row says otherwise, "
        f"top-{TOP_K} (X-LoRA: all) on all linears; {new_tokens(request.config)} tokens decoded after prompts "
        + ("of ShareGPT's lengths" if given else "of log-normal lengths like ShareGPT's") + f", at most {LONGEST} tokens"
    )  # fmt: skip
    with torch.no_grad():
        yield


def new_tokens(config: pytest.Config) -> int:
    return int(config.getoption("--new-tokens")) or NEW_TOKENS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.place}: {row.title}".replace(" ", "_"))
def test_row(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, row: Row, pytestconfig: pytest.Config
) -> None:
    """A row of the paper's table, beside its backbone. --rounds: the number of queries."""
    measure(benchmark, suite, ceilings, rounds, bench, row, pytestconfig, f"a token, {row.place}", row.title)


def measure(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, row: Row, config: pytest.Config, group: str, title: str
) -> None:
    count = new_tokens(config)
    prompts = lengths(rounds or QUERIES, 4, LONGEST, config.getoption("--sharegpt"))
    more: dict[str, Any] = {"error": bench.checked(row), "memory_bytes": bench.memory(row)}
    runs = {row.title: bench.run(row)}
    if row != row.backbone:
        runs["backbone"] = bench.run(row.backbone)
    capacity = max(prompts) + count
    samples, launches = decoding(benchmark, runs, queries(bench, prompts, count), capacity, count, WHERE, rounds, SECONDS)
    cost, taken, strategy = step_cost(bench.backbone, row, capacity), samples[row.title], runs[row.title].strategy
    if cost is not None:
        more |= {"bytes": cost.bytes, "flops": cost.flops, "predicted_ms": 1e3 * model.seconds(cost, ceilings)}
    suite.record(
        f"{group}, {title}", group, f"{title} ({strategy})" if row.strategy == "auto" else title, taken, method=row.method,
        strategy=strategy, ratio=median_ratio(taken, samples["backbone"]), compared_to="backbone", counted_launches=launches[row.title],
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", PROMPTS)
def test_prefill(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, tokens: int) -> None:
    """A prompt, each of its tokens with experts of its own: backbone, unfused and fused."""
    rows = {strategy: Row(strategy, "lora_switch", strategy) for strategy in ("fused", "unfused")}
    rows["backbone"] = rows["fused"].backbone
    check_prefill(bench.exact(), rows)
    prompt, runs = bench.tokens(1, tokens), {strategy: bench.run(row) for strategy, row in rows.items()}
    with ExitStack() as stack:
        opened = {strategy: stack.enter_context(run.open(tokens)) for strategy, run in runs.items()}
        calls = {strategy: lambda _, s=session: s.prefill(prompt) for strategy, session in opened.items()}
        samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS)
    for strategy, taken in samples.items():
        suite.record(
            f"prompt of {tokens}, {strategy}", "a prompt against its length", f"{strategy}, {tokens} tokens", taken, x=tokens,
            axis="tokens", series=strategy, ratio=median_ratio(taken, samples["backbone"]), compared_to="backbone",
        )  # fmt: skip


def check_prefill(bench: Workbench, rows: dict[str, Row]) -> None:
    """The logits after a prompt that is longer than a decode step, against float64, beside the backbone's."""
    tokens = bench.tokens(1, 41)
    found = {strategy: errors(bench.run(row), tokens, 40)["mean_error"] for strategy, row in rows.items()}
    for strategy, error in found.items():
        assert error < WORST_ERROR * found["backbone"] or strategy == "backbone", f"{strategy}: {error / found['backbone']:.3g} times"


@pytest.mark.parametrize("backbone", OTHERS, ids=lambda backbone: backbone.name.replace(" ", "_"))
@pytest.mark.parametrize("r", [16, 64] if GPU else [16])
def test_models(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, pytestconfig: pytest.Config, backbone: Backbone, r: int
) -> None:
    """Fused application on other models."""
    row = Row("fused", "lora_switch", "fused", capture=GPU, config={"r": r})
    bench = workbench(backbone, WHERE)
    measure(benchmark, suite, ceilings, rounds, bench, row, pytestconfig, "a token, other models, fused", f"{backbone.name}, r = {r}")


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, batch: int) -> None:
    """A step of `batch` sequences, each with routes of its own: backbone, unfused and fused."""
    rows = {title: Row(title, "lora_switch", title, capture=GPU) for title in ("fused", "backbone", "unfused")}
    runs = {title: bench.run(row if title != "backbone" else row.backbone) for title, row in rows.items()}
    most = 40  # rounds, and those that are not counted
    tokens = bench.tokens(batch, 4 + most, seed=batch)
    check_batch(bench.exact(), rows["fused"], batch)
    with ExitStack() as stack:
        opened = {title: stack.enter_context(run.open(tokens.shape[1], batch)) for title, run in runs.items()}
        for session in opened.values():
            session.prefill(tokens[:, :4], None)
        calls = {title: lambda number, s=session: s.step(tokens[:, 4 + number]) for title, session in opened.items()}
        samples = in_turn(benchmark, calls, WHERE, min(rounds, most - 4), SECONDS)
    costs = {
        "fused": model.fused_step(BACKBONE, 16, EXPERTS, TOP_K, batch, tokens.shape[1]),
        "backbone": model.backbone_step(BACKBONE, batch, tokens.shape[1]),
    }
    for title in rows:
        known = {"predicted_ms": 1e3 * model.seconds(costs[title], ceilings), "bytes": costs[title].bytes} if title in costs else {}
        suite.record(
            f"{title}, batch {batch}", "a step against the batch, differing routes", f"{title}, batch {batch}", samples[title], x=batch,
            axis="sequences", series=title, ratio=median_ratio(samples[title], samples["backbone"]), compared_to="backbone", **known,
        )  # fmt: skip


def check_batch(bench: Workbench, row: Row, batch: int) -> None:
    """A batch's logits against float64, beside a single sequence's."""
    tokens, run = bench.tokens(batch, 8, seed=batch), bench.run(row)
    one, many = (errors(run, part, 4)["mean_error"] for part in (tokens[:1], tokens))
    assert many < WORST_ERROR * one, f"a batch of {batch}: the mean error is {many / one:.3g} times a single sequence's"


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], float]:
    """Medians of the points so far, by (series, tokens per mixture)."""
    return {}


@pytest.mark.parametrize("life", LIFETIMES)
def test_crossover(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, bench: Workbench, measured: dict[tuple[str, int], float], life: int
) -> None:
    """Tokens that a mixture lives for: merged, fused and auto (`fm.moe.generate`'s), beside what the models say.

    A table gives each token its mixture; a call decodes one mixture's tokens, its switch included.
    """
    rows, runs, prompt = table_runs(bench), {}, 8
    for strategy, row in rows.items():
        if not measured:
            bench.checked(row)
        runs[strategy] = bench.run(row)
    queries = [Query(torch.cat([bench.tokens(1, prompt, n), block(n, life)], dim=1), prompt) for n in range(CLASSES)]
    chosen = choose(runs["fused"].model, torch.cat([block(n, life) for n in range(4)], dim=1), 4 * life)
    order = {"merged": "merged", "fused": "fused", "auto": chosen, "backbone": "backbone"}
    context = prompt + max(LIFETIMES)
    with ExitStack() as stack:
        opened = {strategy: stack.enter_context(run.open(prompt + life)) for strategy, run in runs.items()}
        calls = {title: lambda n, s=opened[strategy]: queries[n % CLASSES].decode(s) for title, strategy in order.items()}
        before = {title: lambda n, s=opened[strategy]: queries[n % CLASSES].prefill(s) for title, strategy in order.items()}
        samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS, before)
    measured |= {(title, life): statistics.median(taken) / life for title, taken in samples.items()}
    plain = model.backbone_step(BACKBONE, context=context)
    costs = {
        "fused": model.fused_step(BACKBONE, 16, EXPERTS, TOP_K, context=context),
        "merged": plain + model.switch_exact(BACKBONE.shapes, 16, TOP_K) * (1 / life),
    }
    for title in ("merged", "fused", "auto"):
        suite.record(
            f"{title}, {life} tokens", "a token against the mixture's life", f"{title}, {life} tokens", [s / life for s in samples[title]],
            x=life, axis="tokens per mixture", series=title, predicted_ms=1e3 * model.seconds(costs[order[title]], ceilings),
            ratio=median_ratio(samples[title], samples["backbone"]), compared_to="backbone", strategy=order[title],
        )  # fmt: skip
    if life == max(LIFETIMES) and ("merged", min(LIFETIMES)) in measured:
        even = break_even(bench, ceilings, measured)
        suite.setting["break_even"] = even
        said = ", ".join(f"{name} {'never' if value is None else format(value, '.3g')}" for name, value in even.items())
        suite.setting["text"] += f". Merging breaks even at so many tokens per mixture: {said}"


def table_runs(bench: Workbench) -> dict[str, Row]:
    """Rows for the picture; the adapted model's table is filled: token v has mixture v modulo CLASSES, no two in a row alike."""
    config = {"router": "table"}
    whole = bench.adapted("lora_switch", config)
    table: Any = next(iter(fm.moe.structure(whole).routers.values()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(CLASSES)])
    gates = torch.rand(CLASSES, TOP_K, generator=generator) + 0.1
    rows = torch.arange(len(table.ids)) % CLASSES
    table.ids.copy_(ids[rows])
    table.gates.copy_((gates / gates.sum(dim=1, keepdim=True))[rows])
    made = {strategy: Row(strategy, "lora_switch", strategy, capture=GPU, config=config) for strategy in ("merged", "fused")}
    return {**made, "backbone": made["fused"].backbone}


def block(number: int, life: int) -> torch.Tensor:
    """int64 [1, life]: tokens of one mixture."""
    return (number % CLASSES + CLASSES * torch.randint(0, 8, (1, life), generator=torch.Generator().manual_seed(number))).to(WHERE)


def break_even(bench: Workbench, ceilings: Ceilings, measured: dict[tuple[str, int], float]) -> dict[str, float | None]:
    """The switch's time over the time that fused application adds to a token; None where it adds nothing."""
    short, long = min(LIFETIMES), max(LIFETIMES)
    whole = bench.adapted("lora_switch", {"router": "table"})
    plain, fused = model.backbone_step(BACKBONE), model.fused_step(BACKBONE, 16, EXPERTS, TOP_K)
    times = {
        "measured": (
            short * (measured["merged", short] - measured["backbone", short]), measured["fused", long] - measured["backbone", long],
        ),
        "modelled": (
            model.seconds(model.switch_exact(BACKBONE.shapes, 16, TOP_K), ceilings),
            model.seconds(fused, ceilings) - model.seconds(plain, ceilings),
        ),
    }  # fmt: skip
    found = {name: switch / extra if extra > 0 else None for name, (switch, extra) in times.items()}
    return {**found, "fm.crossover": fm.crossover(whole, fm.moe.structure(whole).bank(), TOP_K).tokens}
