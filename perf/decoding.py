"""What the decode suites share: one backbone that methods adapt in turn, rows of their tables, and queries."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fusedmerge as fm
from fusedmerge.commands.demo_decode import Run, errors, inject_experts, launches, peak_bytes
from fusedmerge.moe.auto import choose
from perf import model
from perf.backbones import Backbone
from perf.model import Cost
from perf.subjects import llama
from perf.timing import in_turn

if TYPE_CHECKING:
    import torch

__all__ = ["EXPERTS", "TOP_K", "WORST_ERROR", "Query", "Row", "Workbench", "decoding", "lengths", "queries", "step_cost", "workbench"]

EXPERTS, TOP_K, DELTA = 8, 2, 0.07
CHECKED_PROMPT, CHECKED_TOKENS = 12, 6
WORST_ERROR = 1.5  # a method's mean error as a multiple of the backbone's own; beyond it, it computes something else
CHARACTERS = 4  # of English text in a token, about
MEDIAN, SIGMA = 60, 1.4  # of the log-normal lengths of prompts, in tokens: about 160 on average, as ShareGPT's are


@dataclass(frozen=True)
class Row:
    """A model and how it decodes."""

    title: str
    method: str  # "": the backbone
    strategy: str
    engine: str = "decoder"
    capture: bool = False
    packed: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)  # LoRAMoEConfig's, beside the method

    @property
    def place(self) -> str:
        """Of its table."""
        return "transformers, eager" if self.engine == "transformers" else "in a CUDA graph" if self.capture else "eager"

    @property
    def r(self) -> int:
        """The experts' rank."""
        return int(self.config.get("r", 16))

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a plain backbone."""
        return 1 if self.method == "lora" else int(self.config.get("top_k", TOP_K)) if self.method else 0

    @property
    def backbone(self) -> Row:
        """What it is compared with."""
        return Row("backbone", "", "backbone", self.engine, self.capture, self.packed)


class Workbench:
    """A backbone twice, by transformers: as it is, and adapted by one method at a time (which a merging strategy writes into)."""

    def __init__(self, backbone: Backbone, where: torch.device) -> None:
        self.backbone, self.where = backbone, where
        self.plain, self._adapted = llama(backbone, where), llama(backbone, where)
        self._now: tuple[str, str] | None = None
        self._decoders: dict[tuple[bool, bool], Any] = {}  # by (adapted, packed)
        self._errors: dict[str, float] = {}  # of backbones, by table
        self._small: Workbench | None = None

    def adapted(self, method: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """The backbone with random experts of a method."""
        key = (method, repr(sorted(config.items())))
        if key != self._now:
            self._decoders = {place: decoder for place, decoder in self._decoders.items() if not place[0]}
            if self._now is not None:
                fm.moe.eject(self._adapted)
                self._now = None
            sizes = {"num_experts": EXPERTS, "r": 16} if method != "lora" else {"r": 16}
            if method not in ("lora", "xlora"):
                sizes["top_k"] = TOP_K
            inject_experts(self._adapted, DELTA, 0, method=method, **{**sizes, **config})
            self._now = key
        return self._adapted

    def run(self, row: Row) -> Run:
        """What opens its sessions. "auto" is what it chooses for a learned router's tokens."""
        import torch

        whole = self.adapted(row.method, row.config) if row.method else self.plain
        subject: Any = whole
        if row.engine == "decoder":
            key = (bool(row.method), row.packed)
            if key not in self._decoders:
                self._decoders[key] = fm.moe.Decoder.from_model(whole, packed=row.packed)
            subject = self._decoders[key]
        strategy = row.strategy
        if strategy == "auto":
            strategy = choose(subject, torch.zeros(1, CHECKED_PROMPT, dtype=torch.int64, device=self.where), CHECKED_TOKENS)
        return Run(row.engine, row.method, strategy, subject, row.capture)

    def checked(self, row: Row, run_of: Callable[[Workbench, Row], Run] | None = None) -> dict[str, float]:
        """A row's errors against float64, and their mean over the backbone's own. Raises AssertionError where that is out of proportion.

        run_of: in place of `run`. Computed on `exact()`.
        """
        where = self.exact()
        tokens = where.tokens(1, CHECKED_PROMPT + CHECKED_TOKENS)
        if row.place not in self._errors:
            self._errors[row.place] = errors(where.run(row.backbone), tokens, CHECKED_PROMPT)["mean_error"]
        found = errors((run_of or Workbench.run)(where, row), tokens, CHECKED_PROMPT)
        found["of_backbone"] = found["mean_error"] / self._errors[row.place]
        assert found["of_backbone"] < WORST_ERROR, f"{row.title}: the mean error is {found['of_backbone']:.3g} times the backbone's"
        return found

    def memory(self, row: Row) -> int:
        """Bytes of model and experts, and what decoding takes beside them at most."""
        return peak_bytes(self.run(row), self.tokens(1, CHECKED_PROMPT + 3), CHECKED_PROMPT)

    def tokens(self, batch: int, count: int, seed: int = 0) -> torch.Tensor:
        """Random ones, int64 [batch, count]."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.backbone.vocab, (batch, count), generator=generator).to(self.where)

    def exact(self) -> Workbench:
        """Where errors are computed: here, or where the memory does not hold it in float64, two layers of the same shapes."""
        import torch

        needed = 16 * (self.backbone.adapted + 2 * self.backbone.head)  # packing takes a copy
        if self.where.type != "cuda" or self.backbone.layers <= 2 or needed < torch.cuda.mem_get_info()[0]:
            return self
        self._small = self._small or Workbench(replace(self.backbone, layers=2), self.where)
        return self._small


def step_cost(backbone: Backbone, row: Row, context: int) -> Cost | None:
    """What the model says of a step; None for ways that it does not know."""
    if row.method not in ("", "lora", "lora_switch", "mola"):
        return None
    plain = model.backbone_step(backbone, context=context)
    if row.strategy in ("backbone", "merged") and row.method in ("", "lora"):
        return plain
    if row.strategy in ("fused", "auto"):
        return model.fused_step(backbone, row.r, EXPERTS, row.top_k, context=context)
    if row.strategy == "merged" and "target_modules" not in row.config:
        return plain + model.switch_exact(backbone.shapes, row.r, row.top_k)
    return None


def workbench(backbone: Backbone, where: torch.device) -> Workbench:
    """A Workbench; skips the test where the GPU's memory does not hold both models, packed, a pristine copy and experts."""
    import pytest
    import torch

    needed = 10 * (backbone.adapted + 2 * backbone.head)
    if where.type == "cuda" and needed > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"{needed / 1e9:.0f} GB are needed, {torch.cuda.mem_get_info()[0] / 1e9:.0f} GB are free")
    return Workbench(backbone, where)


# ---------------------------------------------------------------------- queries


class Query:
    """A prompt and the tokens that are decoded after it."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self.prompt, self.rest = tokens[:, :prompt], tokens[:, prompt:]

    def prefill(self, session: Any) -> None:
        session.prefill(self.prompt, None)

    def decode(self, session: Any) -> None:
        for t in range(self.rest.shape[1]):
            session.step(self.rest[:, t])


def lengths(count: int, least: int, most: int, sharegpt: str | Path | None = None, seed: int = 0) -> list[int]:
    """Tokens of `count` prompts, each cut to [least, most].

    sharegpt: a JSON list of {"conversations": [{"from": "human", "value": text}, ...]}: the first human turns, drawn at random, a token for
    every four characters. Without it, log-normal lengths.
    """
    rng = random.Random(seed)
    if sharegpt is None:
        found: Sequence[float] = [MEDIAN * rng.lognormvariate(0.0, SIGMA) for _ in range(count)]
    else:
        turns = [entry["conversations"] for entry in json.loads(Path(sharegpt).read_text())]
        texts = [turn[0]["value"] for turn in turns if turn and turn[0].get("from") in ("human", "user")]
        if not texts:
            raise ValueError(f"{sharegpt}: no conversation that a human begins")
        found = [len(rng.choice(texts)) / CHARACTERS for _ in range(count)]
    return [max(least, min(most, round(length))) for length in found]


def queries(bench: Workbench, prompts: Sequence[int], new_tokens: int) -> Callable[[int], Query]:
    """Random tokens of these lengths; the result picks one by round number."""
    made = [Query(bench.tokens(1, prompt + new_tokens, seed), prompt) for seed, prompt in enumerate(prompts)]
    return lambda number: made[number % len(made)]


def decoding(
    benchmark: Any, runs: Mapping[str, Run], query_of: Callable[[int], Query], capacity: int, new_tokens: int, where: torch.device,
    rounds: int, seconds: float,
) -> tuple[dict[str, list[float]], dict[str, int]]:  # fmt: skip
    """(seconds per token of each query, kernels of a step) of every run, in turn; the prompt is not in the time."""
    import torch

    with ExitStack() as stack:
        opened = {name: stack.enter_context(run.open(capacity)) for name, run in runs.items()}

        def before(session: Any) -> Callable[[int], Any]:
            return lambda number: query_of(number).prefill(session)

        def call(session: Any) -> Callable[[int], Any]:
            return lambda number: query_of(number).decode(session)

        calls = {name: call(session) for name, session in opened.items()}
        prefills = {name: before(session) for name, session in opened.items()}
        samples = in_turn(benchmark, calls, where, rounds, seconds, prefills)
        first = query_of(0)
        tokens = torch.cat([first.prompt[:, :4], first.rest[:, :1]], dim=1)
        counts = {name: launches(session, tokens, 4) for name, session in opened.items()}
    return {name: [s / new_tokens for s in taken] for name, taken in samples.items()}, counts
