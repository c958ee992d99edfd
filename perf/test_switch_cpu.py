"""The switch on the CPU, side by side with the ways it replaces, in one process and in turn.

50.9 M-parameter bfloat16 Llama, 8 adapters of rank 64 on all its linears, top-2 (issue 2, "CPU speed").
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import Mixture, Subject, Switch, mixtures

import fusedmerge as fm
from fusedmerge.commands.demo_checks import Truth, same_bits, truth_from_bank, truth_from_files, weight_errors
from fusedmerge.commands.demo_setup import build_llama

pytestmark = pytest.mark.filterwarnings("ignore")
JUDGED = "layers.0."  # where the other ways' errors are measured; the switch is checked everywhere
LEAST_ROUNDED = 0.999  # bfloat16 (KERNELS.md, "Numerics")
SIDE_BY_SIDE, HELD, CALL = "switch, side by side", "adapters held", "call"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, suite: Any) -> Subject:
    found = models.make_subject(Path(tmp_path_factory.mktemp("adapters")))
    count = sum(p.numel() for p in found.model.parameters())
    suite.setting.update(
        text=f"Llama with {count / 1e6:.1f} M parameters in bfloat16, exact mode, "
        f"{models.NUM_ADAPTERS} adapters of rank {models.RANK}, top-{models.TOP_K}",
        parameters=count, adapted=sum(t.numel() for t in found.pristine.values()), model=models.MODEL.__dict__,
        num_adapters=models.NUM_ADAPTERS, r=models.RANK, top_k=models.TOP_K,
    )  # fmt: skip
    return found


def timed(call: Switch, mixture: Mixture) -> float:
    start = time.perf_counter()
    call(mixture)
    return time.perf_counter() - start


def checked(subject: Subject, mixture: Mixture) -> dict[str, float]:
    """The live weights' errors, one target at a time to save memory; anything less than what a switch promises is a wrong result."""
    found = []
    for name, live in subject.live.items():
        errors = weight_errors({name: live}, truth_from_bank({name: subject.pristine[name]}, subject.bank, mixture))
        assert errors["of_bound"] <= 1.0, name
        assert 1.0 - errors["misrounded"] >= LEAST_ROUNDED, name
        found.append((errors, live.numel()))
    total = sum(count for _, count in found)
    return {
        "of_bound": max(errors["of_bound"] for errors, _ in found),
        "misrounded": sum(errors["misrounded"] * count for errors, count in found) / total,
        "of_rounding": sum(errors["of_rounding"] * count for errors, count in found) / total,
    }


def test_side_by_side(benchmark: Any, subject: Subject, suite: Any, rounds: int) -> None:
    """All ways take turns within each round; pytest-benchmark times the switch, its setup times the others."""
    rivals = {
        "copy": ("copy of the adapted weights", models.copy_switch(subject)),
        "peft_float32": ("PEFT unmerge + merge, float32 factors", models.peft_switch(subject, torch.float32)),
        "peft_bfloat16": ("PEFT unmerge + merge, bfloat16 factors", models.peft_switch(subject, torch.bfloat16)),
        "addmm_float32": ("addmm loop, float32", models.addmm_float32(subject)),
        "addmm_bfloat16": ("addmm loop, bfloat16", models.addmm_bfloat16(subject)),
    }
    plan = mixtures(subject.bank.names, rounds + 1)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    upcoming = iter(plan)
    judged = {name: tensor for name, tensor in subject.pristine.items() if JUDGED in name}
    stored, files = truth_from_bank(judged, subject.bank, plan[-1]), truth_from_files(judged, subject.paths, plan[-1])
    rival_errors = {}
    for name, (_, (switch, live)) in rivals.items():  # warm up: PEFT's first switch has nothing to unmerge
        switch(plan[-1])  # errors are those of one merge into pristine weights: later ones would add PEFT's drift
        rival_errors[name] = None if name == "copy" else weight_errors(live, truth_of(name, files, stored))
    subject.switcher.switch(plan[-1])

    def setup() -> tuple[tuple[Mixture], dict[str, Any]]:
        mixture = next(upcoming)
        for name, (_, (switch, _)) in rivals.items():
            seconds[name].append(timed(switch, mixture))
        return (mixture,), {}

    benchmark.pedantic(subject.switcher.switch, setup=setup, rounds=rounds, iterations=1)
    ours = list(benchmark.stats.stats.data)
    last = plan[rounds - 1]
    errors = checked(subject, last)
    copied, least = statistics.median(seconds["copy"]), subject.switch_bytes()
    bandwidth = 2 * subject.adapted_bytes / copied

    def record(name: str, title: str, samples: list[float], nbytes: int, error: dict[str, float] | None) -> None:
        ratio = statistics.median(other / own for other, own in zip(samples, ours, strict=True))
        fraction = nbytes / statistics.median(samples) / bandwidth
        suite.record(
            name, SIDE_BY_SIDE, title, samples, bytes=nbytes, fraction_of_copy=fraction, ratio=ratio, compared_to="switch", error=error
        )

    record("switch", "fusedmerge switch", ours, least, errors)
    for name, (title, _) in rivals.items():
        record(name, title, seconds[name], 2 * subject.adapted_bytes if name == "copy" else least, rival_errors[name])
    subject.switcher.restore()
    assert same_bits(subject.live, subject.pristine)


def truth_of(name: str, files: dict[str, Truth], stored: dict[str, Truth]) -> dict[str, Truth]:
    """Each way is judged by the factors it was given: float32 from the files, or bfloat16 as in the bank."""
    return files if name == "peft_float32" else stored


def test_adapters_held(benchmark: Any, subject: Subject, suite: Any, rounds: int) -> None:
    """A switch's time with 64 adapters in the bank beside that with 8, in turn."""
    switchers = {}
    for count in (8, 64):
        model = build_llama(models.MODEL)
        bank = fm.AdapterBank.random(model, count, models.RANK, targets=subject.bank.targets, seed=count)
        switchers[count] = fm.Switcher(model, bank)
    plans = {count: mixtures(s.bank.names, rounds + 1, seed=count) for count, s in switchers.items()}
    for count, switcher in switchers.items():
        switcher.switch(plans[count].pop())
    few: list[float] = []

    def setup() -> tuple[tuple[Mixture], dict[str, Any]]:
        few.append(timed(switchers[8].switch, plans[8].pop()))
        return (plans[64].pop(),), {}

    benchmark.pedantic(switchers[64].switch, setup=setup, rounds=rounds, iterations=1)
    many = list(benchmark.stats.stats.data)
    ratio = statistics.median(m / f for m, f in zip(many, few, strict=True))
    for name, title, samples, against in (("held_8", "8 adapters", few, 1.0), ("held_64", "64 adapters", many, ratio)):
        suite.record(name, HELD, title, samples, ratio=against, compared_to="8 adapters")
    for switcher in switchers.values():
        switcher.close()


def test_unchanged_call(benchmark: Any, subject: Subject, suite: Any) -> None:
    """The Python call of a switch that has nothing to do: what a server pays per step to keep its mixture."""
    mixture = mixtures(subject.bank.names, 1)[0]
    subject.switcher.switch(mixture)
    before = {name: tensor._version for name, tensor in subject.live.items()}
    benchmark.pedantic(subject.switcher.switch, args=(mixture,), rounds=200, iterations=10)
    assert {name: tensor._version for name, tensor in subject.live.items()} == before
    suite.record("unchanged", CALL, "switch to the mixture that is merged", list(benchmark.stats.stats.data))
    subject.switcher.restore()
