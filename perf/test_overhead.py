"""What does fusedmerge cost when it does nothing: its import, the first compilation, the Python of a call, an attached Switcher?"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedmerge as fm
from fusedmerge.commands.demo_setup import weights_of
from perf.backbones import LLAMA_2_7B
from perf.evidence import Suite
from perf.model import Ceilings
from perf.subjects import checked, llama, make_bank, mixtures
from perf.timing import Stopwatch, device, in_turn, median_ratio

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = device()
GPU = WHERE.type == "cuda"
IMPORT, COMPILE, CALL, ATTACHED, LAUNCH = "import", "compilation of the switch kernel", "Python call", "forward pass", "launch"
CALLS = 200


@pytest.fixture(scope="module", autouse=True)
def _setting(suite: Suite) -> None:
    suite.setting["text"] = "Calls are of a Switcher on 224 matrices in 32 layers, as Llama-2-7B has, of 16 x 16 weights each"


def test_import(benchmark: Any, suite: Suite, rounds: int) -> None:
    """`import fusedmerge` in a fresh interpreter, beside an interpreter alone and `import torch`."""
    programs = {"interpreter": "pass", "numpy": "import numpy", "fusedmerge": "import fusedmerge", "torch": "import torch"}

    def run(program: str) -> Callable[[int], Any]:
        return lambda _: subprocess.run([sys.executable, "-c", program], check=True)

    calls = {name: run(program) for name, program in programs.items()}
    samples = in_turn(benchmark, calls, torch.device("cpu"), rounds or 5)
    for name, title in zip(programs, ("the interpreter alone", "import numpy", "import fusedmerge", "import torch"), strict=True):
        suite.record(name, IMPORT, title, samples[name])


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_compilation(benchmark: Any, suite: Suite, rounds: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JIT's kernel, with an empty cache and with a full one; without a GPU, compiled for compute capability 9.0."""
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    try:
        version = nvrtc.getVersion()
    except Exception as error:  # CuPy tells a missing NVRTC in several ways
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    from fusedmerge.backend import compiler, jit, params

    capability = torch.cuda.get_device_capability() if GPU else (9, 0)
    kernel = jit.switch_kernel((params.BF16, params.BF16, params.BF16), inplace=False, resident_chunks=1)
    directories = iter(range(1000))

    def prepare() -> None:
        if state == "cold" or not list(tmp_path.iterdir()):
            monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path / str(next(directories))))
        if state == "warm":
            compiler.compiled(kernel, capability)

    seconds = []

    def run() -> None:
        start = time.perf_counter()
        path = compiler.compiled(kernel, capability)
        seconds.append(time.perf_counter() - start)
        assert path.stat().st_size

    benchmark.pedantic(run, setup=prepare, rounds=rounds or (3 if state == "cold" else 10), iterations=1)
    title = {"cold": "compiled by NVRTC", "warm": "found in the cache"}[state]
    where = f"{torch.cuda.get_device_name()}" if GPU else "compute capability 9.0"
    suite.record(state, COMPILE, f"{title} (NVRTC {version[0]}.{version[1]}, {where})", seconds)


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple[nn.Module, fm.AdapterBank]]:
    """224 matrices of 16 x 16 in a module tree like a decoder's."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
            self.mlp = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("gate_proj", "up_proj", "down_proj")})

    whole = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(LLAMA_2_7B.layers))}).to(WHERE, torch.bfloat16)
    bank = make_bank(weights_of(whole, [name for name, _ in whole.named_parameters()]), 8, 16)
    assert len(bank.targets) == len(LLAMA_2_7B.shapes)
    yield whole, bank


def test_call(benchmark: Any, suite: Suite, tiny: tuple[nn.Module, fm.AdapterBank]) -> None:
    """The host's time of `switch`, without waiting for the device: a new mixture each time, and one that is merged already.

    On a CPU the new mixture's time includes the merge of 57 thousand weights.
    """
    whole, bank = tiny
    switcher = fm.Switcher(whole, bank)
    live = weights_of(whole, bank.targets)
    base = {name: tensor.clone() for name, tensor in live.items()}
    plan = mixtures(bank.names, 2)

    def timed(call: Callable[[int], Any]) -> list[float]:
        seconds = []
        for number in range(CALLS):
            start = time.perf_counter()
            call(number)
            seconds.append(time.perf_counter() - start)
            if GPU:
                torch.cuda.synchronize()
        return seconds

    kinds: dict[str, tuple[str, Callable[[int], Any]]] = {
        "new": ("a new mixture", lambda number: switcher.switch(plan[number % len(plan)]))
    }
    kinds["unchanged"] = ("the mixture that is merged", lambda _: switcher.switch(plan[0]))
    if GPU:
        ids, gates = torch.tensor([1, 2], dtype=torch.int32, device=WHERE), torch.tensor([0.5, 0.25], device=WHERE)
        kinds["device"] = ("ids and gates on the GPU", lambda _: switcher.switch(ids, gates))
    for name, (title, call) in kinds.items():
        call(0)
        suite.record(name, CALL, title, timed(call))
    switcher.switch(plan[0])
    before = {name: tensor._version for name, tensor in live.items()}
    benchmark.pedantic(switcher.switch, args=(plan[0],), rounds=CALLS, iterations=1)
    assert {name: tensor._version for name, tensor in live.items()} == before
    checked(live, base, bank, plan[0], rows=None)
    switcher.close()


@pytest.mark.skipif(not GPU, reason="a CPU has no launches")
def test_launch(benchmark: Any, suite: Suite, ceilings: Ceilings, tiny: tuple[nn.Module, fm.AdapterBank]) -> None:
    """The gap between launches in a graph, and a replayed switch that finds its selection merged."""
    whole, bank = tiny
    switcher = fm.Switcher(whole, bank)
    ids, gates = torch.tensor([1, 2], dtype=torch.int32, device=WHERE), torch.tensor([0.5, 0.25], device=WHERE)
    switcher.switch(ids, gates)
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), 100
    with torch.cuda.graph(graph):
        for _ in range(count):
            switcher.switch(ids, gates)
    watch = Stopwatch(WHERE)
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.append(watch(graph.replay) / count), rounds=20, iterations=1)
    suite.record("gap", LAUNCH, "a kernel that does next to nothing, in a CUDA graph", [ceilings.launch])
    suite.record(
        "replay", LAUNCH, "a replayed switch to the selection that is merged", seconds, predicted_ms=1e3 * ceilings.launch, launches=1
    )
    assert dict(switcher.active) == {bank.names[1]: 0.5, bank.names[2]: 0.25}


def test_forward(benchmark: Any, suite: Suite, rounds: int) -> None:
    """A model's forward pass with a Switcher attached, nothing merged and something merged, beside the same model without one."""
    size = LLAMA_2_7B if GPU else LLAMA_2_7B.scaled(256, 4)
    with torch.no_grad():
        plain, attached, merged = (llama(size.scaled(1024, 8) if GPU else size, WHERE) for _ in range(3))
        ids = torch.arange(16, device=WHERE)[None] % 1000
        banks = [make_bank(weights_of(m, [n for n, _ in m.named_parameters() if "proj" in n]), 2, 16) for m in (attached, merged)]
        switchers = [fm.Switcher(m, bank) for m, bank in zip((attached, merged), banks, strict=True)]
        switchers[1].switch({"0": 0.5, "1": 0.5})
        want = plain(ids).logits
        models = {"plain": plain, "attached": attached, "merged": merged}

        def forward(run: nn.Module) -> Callable[[int], Any]:
            return lambda _: run(ids)

        calls = {name: forward(run) for name, run in models.items()}
        samples = in_turn(benchmark, calls, WHERE, rounds, 2.0)
        assert torch.equal(attached(ids).logits, want) and not torch.equal(merged(ids).logits, want)
    titles = ("the backbone", "with a Switcher, no adapter active", "with a mixture of two merged")
    for name, title in zip(models, titles, strict=True):
        suite.record(name, ATTACHED, title, samples[name], ratio=median_ratio(samples[name], samples["plain"]), compared_to="the backbone")
