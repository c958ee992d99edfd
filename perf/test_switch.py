"""Is the switch as fast as a copy of the bytes that it must move, and how much faster than the ways it replaces?

On a GPU: Llama-2-7B, Mistral-7B, Llama-3-8B, a layer of Llama-3-70B. On a CPU: models of their proportions with about 50 M adapted weights.
All ways of a comparison take turns within each round; every result is compared with float64 truth in the same run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import fusedmerge as fm
from fusedmerge.backend import backends
from fusedmerge.commands.demo import distance, milestones
from fusedmerge.commands.demo_checks import same_bits
from fusedmerge.commands.demo_setup import clone, weights_of
from perf import model, rivals
from perf.backbones import LLAMA_2_7B, Backbone
from perf.evidence import Suite
from perf.model import Ceilings, Cost
from perf.subjects import backbones, checked, errors, llama, make_bank, make_weights, mixtures
from perf.timing import device, in_turn, median_ratio

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = device()
GPU = WHERE.type == "cuda"
BACKBONES = backbones(WHERE)
NUM_ADAPTERS, RANK, TOP_K = 8, 64, 2
SECONDS = 4.0  # of rounds per comparison
WORST_RIVAL = 4.0  # root mean square error of another way, as a multiple of correct rounding's; beyond it, it merges something else
SIDE_BY_SIDE, SHAPES, CORNERS, FP8_BASE = "switch, side by side", "models", "ranks, adapters, experts", "base in fp8"
DRIFT = "drift"
Calls = dict[str, Callable[[int], Any]]
Weights = Mapping[str, torch.Tensor]
TITLES = {
    "exact": "fusedmerge switch",
    "inplace": "fusedmerge switch, inplace",
    "copy": "copy with the switch's traffic",
    "peft_float32": "PEFT unmerge + merge, float32 factors",
    "peft_bfloat16": "PEFT unmerge + merge, bfloat16 factors",
    "addmm_float32": "addmm loop, float32",
    "addmm_bfloat16": "addmm loop, bfloat16",
    "addmm_bfloat16_captured": "addmm loop, bfloat16, in a CUDA graph",
    "addmm_bfloat16_compiled": "addmm loop, bfloat16, torch.compile",
    "triton": "single-matrix Triton merge",
}


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> None:
    main = BACKBONES[0]
    suite.setting |= {
        "text": f"{main.name}: {main.adapted / 1e6:.4g} M adapted bfloat16 weights in {len(main.shapes)} matrices; unless a row says "
        f"otherwise {NUM_ADAPTERS} adapters of rank {RANK}, top-{TOP_K}, exact mode",
        "adapted": main.adapted, "num_adapters": NUM_ADAPTERS, "r": RANK, "top_k": TOP_K,
    }  # fmt: skip


def switch_of(subject: fm.Switcher, plan: list[dict[str, float]]) -> Callable[[int], None]:
    return lambda number: subject.switch(plan[number % len(plan)])


def of_plan(rival: rivals.Switch, plan: list[dict[str, float]]) -> Callable[[int], Any]:
    return lambda number: rival(plan[number % len(plan)])


def record(
    suite: Suite, ceilings: Ceilings, name: str, group: str, title: str, samples: Mapping[str, list[float]], key: str, against: str,
    cost: Cost, **more: Any,
) -> None:  # fmt: skip
    """One case: its samples, its ratio to `against`, and what the model says of `cost`; the fraction is of the measured copy's rate."""
    float32 = key in ("peft_float32", "addmm_float32")
    median = sorted(samples[key])[len(samples[key]) // 2]
    suite.record(
        name, group, title, samples[key], bytes=cost.bytes, flops=cost.flops, launches=cost.launches,
        predicted_ms=1e3 * model.seconds(cost, ceilings, float32), fraction_of_copy=cost.bytes / median / ceilings.copy,
        ratio=median_ratio(samples[key], samples[against]), **{"compared_to": against, **more},
    )  # fmt: skip


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """What a call allocates on the GPU beside what was there."""
    if not GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def nbytes(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def test_side_by_side(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int) -> None:
    """The switch, the copy, PEFT and the loops, on the main model."""
    backbone = BACKBONES[0]
    require_room(backbone, 4 * NUM_ADAPTERS, RANK, copies=4)  # PEFT holds the bank's adapters in float32, and once more in bfloat16
    whole = llama(backbone, WHERE)
    live = weights_of(whole, list(backbone.linears()))
    bank = make_bank(live, NUM_ADAPTERS, RANK)
    base, other = clone(live), clone(live)  # `other`: where the loops write
    switcher = fm.Switcher(whole, bank, base=base)
    plan = mixtures(bank.names, TOP_K)
    peft_live, peft_switches, peft_restore = rivals.peft(whole, bank, RANK)
    shapes = backbone.shapes
    exact, fast_loop = model.switch_exact(shapes, RANK, TOP_K), model.addmm_bfloat16(shapes, RANK, TOP_K)
    costs = {
        "exact": exact,
        "copy": model.copy(exact.bytes),
        "peft_float32": model.peft(shapes, RANK, TOP_K, 4),
        "peft_bfloat16": model.peft(shapes, RANK, TOP_K, 2),
        "addmm_float32": model.addmm_float32(shapes, RANK, TOP_K),
        "addmm_bfloat16": fast_loop,
        "addmm_bfloat16_captured": fast_loop,
        "addmm_bfloat16_compiled": fast_loop,
        "triton": replace(exact, launches=len(shapes)),
    }
    merges = {f"peft_{dtype}": (switch, peft_live) for dtype, switch in peft_switches.items()}
    loops: dict[str, rivals.Switch] = {
        "addmm_float32": rivals.addmm_float32(base, other, bank),
        "addmm_bfloat16": rivals.Addmm(base, other, bank, TOP_K),
        **gpu_loops(base, other, bank, suite),
    }
    merges |= {name: (switch, other) for name, switch in loops.items()}
    found = {}
    for name, (switch, written) in merges.items():  # errors are those of one merge into pristine weights: later ones would add PEFT's drift
        switch(plan[0])
        found[name] = errors(written, base, bank, plan[0], rows=16)
        assert found[name]["of_rounding"] <= WORST_RIVAL, name
        if name.startswith("peft"):
            peft_restore()
            for target, tensor in peft_live.items():
                tensor.copy_(base[target])
    copied = rivals.copy_of(costs["copy"].bytes, WHERE)
    calls: Calls = {"exact": switch_of(switcher, plan), "copy": copied, **{name: of_plan(merges[name][0], plan) for name in merges}}
    before = {name: of_plan(merges[name][0], plan[1:] + plan[:1]) for name in merges if name.startswith("peft")}  # to be unmerged
    samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS, before)
    switcher.switch(plan[0])
    found["exact"] = checked(live, base, bank, plan[0], rows=None if not GPU else 16)
    memory = {"exact": {"extra_bytes": nbytes(base), "peak_bytes": peak_bytes(lambda: switcher.switch(plan[1]))}}
    for name in calls:
        more = {"error": found.get(name), **memory.get(name, {})}
        record(suite, ceilings, name, SIDE_BY_SIDE, TITLES[name], samples, name, "exact", costs[name], compared_to="switch", **more)
    switcher.restore()
    assert same_bits(live, base)


def gpu_loops(base: Weights, other: Weights, bank: fm.AdapterBank, suite: Suite) -> dict[str, rivals.Switch]:
    """What needs a GPU: the loop in a CUDA graph and through torch.compile, and Triton. What does not compile is noted, not measured."""
    if not GPU:
        return {}
    found: dict[str, rivals.Switch] = {"addmm_bfloat16_captured": rivals.Addmm(base, other, bank, TOP_K).captured()}
    compiled: dict[str, Callable[[], rivals.Switch]] = {
        "addmm_bfloat16_compiled": lambda: rivals.Addmm(base, other, bank, TOP_K).compiled(),
        "triton": lambda: importlib.import_module("perf.triton_merge").switch(base, other, bank),
    }
    for name, make in compiled.items():
        try:
            switch = make()
            switch(mixtures(bank.names, TOP_K)[0])
        except Exception as error:  # whatever a compiler raises
            suite.setting.setdefault("not_measured", {})[name] = f"{type(error).__name__}: {error}"[:500]
        else:
            found[name] = switch
    return found


def require_room(backbone: Backbone, num_adapters: int, r: int, copies: int) -> None:
    """Skip what the GPU's memory does not hold: so many copies of the weights, the bank, and the stacks that it is made from."""
    needed = copies * backbone.adapted * model.WEIGHT + 2 * num_adapters * model.factor_bytes(backbone.shapes, r) + 2 * rivals.COPY_BYTES
    if GPU and needed > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"{needed / 1e9:.0f} GB are needed, {torch.cuda.mem_get_info()[0] / 1e9:.0f} GB are free")


def measure_point(
    benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, group: str, title: str, backbone: Backbone, sizes: tuple[int, int, int]
) -> None:  # fmt: skip
    """exact, inplace, and copies with their traffics, in turn; the two switches have weights of their own. sizes: N, r, k."""
    num_adapters, r, k = sizes
    require_room(backbone, num_adapters, r, copies=3)
    base = make_weights(backbone, WHERE)
    bank = make_bank(base, num_adapters, r)
    plan = mixtures(bank.names, k)
    costs = {"exact": model.switch_exact(backbone.shapes, r, k), "inplace": model.switch_inplace(backbone.shapes, r, k)}
    live = {mode: clone(base) for mode in costs}
    switchers = {"exact": fm.Switcher(live["exact"], bank, base=base), "inplace": fm.Switcher(live["inplace"], bank, "inplace")}
    found = {}
    for mode, switcher in switchers.items():  # the first switch: in place, too, it starts from the base
        switcher.switch(plan[0])
        found[mode] = checked(live[mode], base, bank, plan[0])
    calls: Calls = {mode: switch_of(switcher, plan) for mode, switcher in switchers.items()}
    calls |= {f"copy_{mode}": rivals.copy_of(cost.bytes, WHERE) for mode, cost in costs.items()}
    samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS / 4)
    for mode, switcher in switchers.items():
        peak = peak_bytes(functools.partial(switcher.switch, plan[1]))
        more = {"error": found[mode], "extra_bytes": nbytes(base) if mode == "exact" else 0, "peak_bytes": peak}
        samples_of = {mode: samples[mode], "copy": samples[f"copy_{mode}"]}
        name = f"{title}, {mode}"
        record(suite, ceilings, name, group, name, samples_of, mode, "copy", costs[mode], **more)
        switcher.close()


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name.replace(" ", "_"))
def test_models(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, backbone: Backbone) -> None:
    """Both modes on every model, beside a copy of the same bytes."""
    measure_point(benchmark, suite, ceilings, rounds, SHAPES, backbone.name, backbone, (NUM_ADAPTERS, RANK, TOP_K))


CORNER_POINTS = [  # (N, r, k)
    (NUM_ADAPTERS, 8, TOP_K),
    (NUM_ADAPTERS, 16, TOP_K),
    (NUM_ADAPTERS, 256, TOP_K),
    (NUM_ADAPTERS, RANK, 1),
    (NUM_ADAPTERS, RANK, 4),
    (256, 16, TOP_K),
]


@pytest.mark.parametrize("sizes", CORNER_POINTS, ids=lambda sizes: "N={},r={},k={}".format(*sizes))
def test_corners(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int, sizes: tuple[int, int, int]) -> None:
    """The ends of the ranges of r, k and N on the main model (test_scaling.py has what lies between)."""
    measure_point(benchmark, suite, ceilings, rounds, CORNERS, "N = {}, r = {}, top-{}".format(*sizes), BACKBONES[0], sizes)


def fp8_base(shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random fp8 weights with a scale per row: (the base to give, its float32 values, the live weights)."""
    generator = torch.Generator(WHERE).manual_seed(0)
    base, values, live = {}, {}, {}
    for name, shape in shapes.items():
        q = torch.empty(shape, device=WHERE).normal_(generator=generator).to(torch.float8_e4m3fn)
        scale = torch.empty(shape[0], device=WHERE).uniform_(0.01, 0.03, generator=generator)
        base[name], values[name] = (q, scale), q.float() * scale[:, None]
        live[name] = values[name].bfloat16()
    return base, values, live


@pytest.mark.skipif(not GPU, reason="an fp8 base needs a GPU (test_on_the_simulator checks its values)")
def test_fp8_base(benchmark: Any, suite: Suite, ceilings: Ceilings, rounds: int) -> None:
    """An exact switch from an fp8 base beside a copy with that traffic, three quarters of the usual."""
    backbone = BACKBONES[0]
    base, values, live = fp8_base(backbone.linears())
    bank = make_bank(live, NUM_ADAPTERS, RANK)
    plan = mixtures(bank.names, TOP_K)
    switcher = fm.Switcher(live, bank, base=base)
    switcher.switch(plan[0])
    error = checked(live, values, bank, plan[0])
    del values
    cost = model.switch_exact(backbone.shapes, RANK, TOP_K, base=1)
    calls: Calls = {"exact": switch_of(switcher, plan), "copy": rivals.copy_of(cost.bytes, WHERE)}
    samples = in_turn(benchmark, calls, WHERE, rounds, SECONDS)
    more = {"error": error, "extra_bytes": sum(q.nbytes + scale.nbytes for q, scale in base.values())}
    record(suite, ceilings, "fp8", FP8_BASE, "fusedmerge switch from an fp8 base", samples, "exact", "copy", cost, **more)
    record(suite, ceilings, "fp8_copy", FP8_BASE, TITLES["copy"], samples, "copy", "copy", model.copy(cost.bytes))


@pytest.mark.skipif(GPU, reason="the kernels themselves run here")
@pytest.mark.parametrize("mode", ["exact", "inplace", "fp8"])
def test_on_the_simulator(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The CUDA kernel's sources on the host simulator, on a tiny model: values, no times."""
    if not backends()["sim"]:
        pytest.skip(backends()["sim"].reason)
    monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    tiny = LLAMA_2_7B.scaled(64, 1)
    fp8, values, live = fp8_base(tiny.linears())
    base = {"exact": clone(live), "inplace": None, "fp8": fp8}[mode]
    pristine = values if mode == "fp8" else clone(live)
    bank = make_bank(live, 3, 16)
    switcher = fm.Switcher(live, bank, "inplace" if mode == "inplace" else "exact", base=base)
    for mixture in mixtures(bank.names, 2, count=1 if mode == "inplace" else 3):
        switcher.switch(mixture)
        checked(live, pristine, bank, mixture)


@pytest.fixture
def one_thread() -> Any:
    """For matrices so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_drift(benchmark: Any, suite: Suite) -> None:
    """What switching leaves behind: PEFT, inplace and exact go through the same mixtures; at milestones the mixture is taken out."""
    count, backbone = 500, LLAMA_2_7B.scaled(256, 2)
    whole = llama(backbone, WHERE)
    live: dict[str, Weights] = {mode: clone(weights_of(whole, list(backbone.linears()))) for mode in ("inplace", "exact")}
    base = clone(live["exact"])
    bank = make_bank(base, NUM_ADAPTERS, 16)
    live["peft"], peft_switches, peft_restore = rivals.peft(whole, bank, 16)
    switchers = {mode: fm.Switcher(live[mode], bank, mode) for mode in ("inplace", "exact")}
    plan = mixtures(bank.names, TOP_K, count)
    switches = {"peft": peft_switches["bfloat16"], **{mode: s.switch for mode, s in switchers.items()}}
    restores = {"peft": peft_restore, **{mode: s.restore for mode, s in switchers.items()}}
    switchers["exact"].switch(plan[0])
    delta = distance(live["exact"], base)
    switchers["exact"].restore()
    curves: dict[str, list[list[float]]] = {mode: [] for mode in switches}
    marks = set(milestones(count))

    def step(number: int) -> None:
        for mode, switch in switches.items():
            switch(plan[number])
            if number + 1 in marks:
                restores[mode]()
                curves[mode].append([number + 1, distance(live[mode], base)])

    numbers = iter(range(count))
    benchmark.pedantic(step, setup=lambda: ((next(numbers),), {}), rounds=count, iterations=1)
    assert same_bits(live["exact"], base)
    for mode, title in (("peft", "PEFT unmerge + merge"), ("inplace", "Switcher, inplace"), ("exact", "Switcher, exact")):
        suite.record_drift(mode, DRIFT, title, curves[mode], delta)
