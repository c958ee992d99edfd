"""`fusedmerge demo`: the main job from end to end, on real formats, with every figure computed in the run.

A small random Llama (transformers) and adapters (PEFT) are written to disk and read back; mixtures of them are merged by PEFT's own means
and by this library, and all results are compared with float64 truth (see `demo_checks`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.commands.demo_setup import DemoConfig, Stage
from fusedmerge.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["ADAPTERS", "DemoConfig", "run"]

Mixture = dict[str, float]

THREADS = 1  # matrices this small gain nothing from more, and threads that wait for each other on a busy machine take seconds

# name -> LoraConfig arguments: different ranks, rslora, a rank pattern, partial targets
ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "code": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "chat": {"r": 32, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
    "legal": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "poetry": {"r": 24, "lora_alpha": 24, "rank_pattern": {"down_proj": 4}, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
}


def run(out: str | Path, config: DemoConfig | None = None, progress: bool = True) -> dict[str, Any]:
    """Run the whole demo into directory `out`, and return its report (also written there as demo.json, with drift.png).

    Raises InvalidValueError if `out` is a file.
    """
    from fusedmerge.commands import demo_checks
    from fusedmerge.commands.plot_pictures import plot_drift

    config = config or DemoConfig()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InvalidValueError("demo", "--out", "a directory", f"a file ({out})")
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _bar(config, progress) as bar, _threads(THREADS):
        stage = prepare(config, out, bar.set_description)
        bar.update()
        report: dict[str, Any] = {"config": asdict(config), "versions": versions(), "model": describe(stage)}
        for name, step in (("accuracy", demo_checks.accuracy), ("checkpoint", demo_checks.checkpoint)):
            stage.progress(name)
            report[name] = step(stage)
            bar.update()
        stage.progress("drift")
        report["drift"] = drift(stage, bar.update)
    plot_drift(report["drift"], out / "drift.png")
    report["seconds"] = time.perf_counter() - start
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


@contextmanager
def _bar(config: DemoConfig, progress: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=3 + config.switches, disable=not progress, leave=False, dynamic_ncols=True) as bar:
        yield bar


def prepare(config: DemoConfig, out: Path, progress: Callable[[str], Any]) -> Stage:
    """Write the base and the adapters with transformers and PEFT, and load the base back."""
    import torch
    from transformers import AutoModelForCausalLM

    from fusedmerge.commands.demo_setup import build_llama, write_adapters

    progress("writing base and adapters")
    base = build_llama(config.model, config.seed)
    base.save_pretrained(str(out / "base"))
    adapters = write_adapters(base, out / "adapters", ADAPTERS, config.delta, config.seed)
    loaded = AutoModelForCausalLM.from_pretrained(str(out / "base"), dtype=torch.bfloat16).eval()
    return Stage(config, out, loaded, adapters, progress)


def versions() -> dict[str, str]:
    """The versions that matter for the figures."""
    import platform
    from importlib.metadata import version

    import fusedmerge

    ours = {"python": platform.python_version(), "fusedmerge": fusedmerge.__version__}
    return ours | {name: version(name) for name in ("torch", "transformers", "peft")}


def describe(stage: Stage) -> dict[str, Any]:
    """The model and its bank."""
    from fusedmerge.bank import AdapterBank

    bank = AdapterBank.from_peft(stage.adapters, stage.base)
    return {
        "parameters": sum(p.numel() for p in stage.base.parameters()),
        "adapted": sum(bank.target(n).spec.shape[0] * bank.target(n).spec.shape[1] for n in bank.targets),
        "dtype": str(stage.base.dtype).removeprefix("torch."),
        "targets": len(bank.targets),
        "adapters": {name: _ranks(bank, name) for name in bank.names},
        "bank_bytes": bank.nbytes,
        "cast_error": bank.cast_error,
    }


def _ranks(bank: Any, name: str) -> dict[str, Any]:
    ranks = [bank.target(target).ranks[bank.slot(name)] for target in bank.targets]
    return {"ranks": sorted({r for r in ranks if r}), "targets": sum(1 for r in ranks if r)}


# ---------------------------------------------------------------------- drift and time


def schedule(names: Iterable[str], count: int, seed: int) -> list[Mixture]:
    """`count` random mixtures of two adapters with softmax gates, no two alike in a row."""
    import random

    pool, rng = list(names), random.Random(seed)
    found: list[Mixture] = []
    while len(found) < count:
        pair = rng.sample(pool, 2)
        gate = rng.uniform(0.1, 0.9)
        mixture = {pair[0]: gate, pair[1]: 1.0 - gate}
        if not found or mixture != found[-1]:
            found.append(mixture)
    return found


def milestones(count: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... and `count`."""
    steps = [m * 10**e for e in range(len(str(count))) for m in (1, 2, 5)]
    return [*(s for s in steps if s < count), count]


def drift(stage: Stage, step: Callable[[], Any]) -> dict[str, Any]:
    """Switch PEFT, inplace and exact through the same mixtures, in turn; measure the restored weights at milestones and time each switch.

    Drift is ||W - W0|| / ||W0|| over the adapted weights with the mixture taken out. Each method has a model of its own.
    """
    import copy

    from fusedmerge.bank import AdapterBank
    from fusedmerge.commands.demo_checks import differing, same_bits
    from fusedmerge.commands.demo_setup import PeftSwitch, clone, peft_load, weights_of
    from fusedmerge.switcher import Switcher

    bank = AdapterBank.from_peft(stage.adapters, stage.base)
    wrapped = peft_load(stage.base, stage.adapters)
    models: dict[str, torch.nn.Module] = {"peft": wrapped, "inplace": copy.deepcopy(stage.base), "exact": copy.deepcopy(stage.base)}
    live = {name: weights_of(model, bank.targets) for name, model in models.items()}
    switchers: dict[str, Any] = {"peft": PeftSwitch(wrapped)}
    switchers |= {mode: Switcher(models[mode], bank, mode=mode) for mode in ("inplace", "exact")}
    pristine = clone(live["exact"])
    pointers = {name: [p.data_ptr() for p in model.parameters()] for name, model in models.items()}
    once = clone(_merged(switchers["exact"], stage.shown, live["exact"]))

    mixtures = schedule(stage.adapters, stage.config.switches, stage.config.seed)
    marks = set(milestones(len(mixtures)))
    seconds: dict[str, list[float]] = {name: [] for name in switchers}
    drifts: dict[str, list[list[float]]] = {name: [] for name in switchers}
    for index, mixture in enumerate(mixtures, start=1):
        for name in _turn(list(switchers), index):
            seconds[name].append(_timed(switchers[name].switch, mixture))
            if index in marks:
                switchers[name].restore()
                drifts[name].append([index, distance(live[name], pristine)])
        step()
    changed = {name: differing(live[name], pristine) for name in switchers}
    return {
        "methods": {
            name: {
                "drift": drifts[name],
                "changed": changed[name],
                "restored_bitwise": same_bits(live[name], pristine),
                "pointers_stable": [p.data_ptr() for p in models[name].parameters()] == pointers[name],
                "median_ms": 1e3 * statistics.median(seconds[name]),
                "peft_over_this": statistics.median(p / s for p, s in zip(seconds["peft"], seconds[name], strict=True)),
                "samples_ms": [round(1e3 * s, 4) for s in seconds[name]],
                "extra_bytes": getattr(switchers[name], "nbytes", 0),
            }
            for name in switchers
        },
        "delta": distance(once, pristine),
        "merged_bitwise_as_first": same_bits(_merged(switchers["exact"], stage.shown, live["exact"]), once),
        "switches": len(mixtures),
        "threads": THREADS,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch with `count` threads, for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merged(switcher: Any, mixture: Mixture, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of the live weights with a mixture in; the mixture is taken out again."""
    from fusedmerge.commands.demo_setup import clone

    with switcher.switched(mixture):
        return clone(live)


def _turn(names: list[str], index: int) -> list[str]:
    """The methods in an order that changes each time, so that none always follows the same one."""
    start = index % len(names)
    return names[start:] + names[:start]


def _timed(call: Callable[[Mixture], Any], mixture: Mixture) -> float:
    start = time.perf_counter()
    call(mixture)
    return time.perf_counter() - start


def distance(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """||left - right|| / ||right|| over all tensors, in float64."""
    apart = sum(float((left[name].double() - right[name].double()).square().sum()) for name in right)
    return (apart / sum(float(right[name].double().square().sum()) for name in right)) ** 0.5
