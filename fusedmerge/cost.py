"""What a mixture costs, merged or applied beside the backbone: bytes, operations, launches, and the seconds they take on a device.

A switch moves every adapted weight (LoRA-Switch, arXiv 2405.17741, section 3); fused application moves only the chosen experts' factors,
but again for each token. So merging pays for a mixture that lives long enough, and `crossover` says how long that is.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fusedmerge import backend
from fusedmerge.errors import InvalidTypeError, InvalidValueError, UnknownNameError
from fusedmerge.weights import Weights, collect

if TYPE_CHECKING:
    import torch

    from fusedmerge.bank import AdapterBank

__all__ = [
    "Crossover",
    "Rates",
    "TargetSize",
    "Work",
    "crossover",
    "distinct_experts",
    "factor_bytes",
    "fused_work",
    "measure_rates",
    "reads_twice",
    "switch_work",
    "target_sizes",
]


class TargetSize(NamedTuple):
    """One adapted weight and its adapters, as a bank holds them."""

    rows: int
    cols: int
    rank: int  # as stored: the largest on this target, padded
    weight_itemsize: int  # bytes of a weight's element
    factor_itemsize: int  # bytes of a factor's element


@dataclass(frozen=True)
class Rates:
    """What a device does. Measured by `measure_rates`, or given."""

    bytes_per_second: float  # of a copy: bytes read + bytes written; on the CPU at most what a linear for one token reads
    flops_per_second: float  # of a matrix product
    launch_seconds: float  # of one launch more; on the CPU, what lora_linear itself costs a call

    def __post_init__(self) -> None:
        for field, least in (("bytes_per_second", 1.0), ("flops_per_second", 1.0), ("launch_seconds", 0.0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidTypeError("Rates", field, "a number", type(value).__name__)
            if not math.isfinite(value) or value < least:
                raise InvalidValueError("Rates", field, f"a finite number of at least {least:g}", value)


@dataclass(frozen=True)
class Work:
    """Memory traffic, arithmetic and launches."""

    nbytes: float
    flops: float
    launches: int

    def seconds(self, rates: Rates) -> float:
        """Traffic and arithmetic overlap, launches do not: max(bytes / rate, flops / rate) + launches * launch."""
        return max(self.nbytes / rates.bytes_per_second, self.flops / rates.flops_per_second) + self.launches * rates.launch_seconds


@dataclass(frozen=True, repr=False)
class Crossover:
    """Where merging and fused application cost the same."""

    tokens: float  # decode steps for which a mixture must live
    switch_seconds: float
    fused_extra_seconds_per_token: float  # over the backbone's own step
    switch: Work
    fused_extra: Work
    rates: Rates

    def __repr__(self) -> str:
        return (
            f"Crossover(merge where a mixture lives for more than {self.tokens:.1f} tokens: "
            f"switch {self.switch_seconds * 1e3:.3g} ms ({self.switch.nbytes / 1e9:.3g} GB), "
            f"fused +{self.fused_extra_seconds_per_token * 1e3:.3g} ms a token ({self.fused_extra.nbytes / 1e9:.3g} GB), "
            f"at {self.rates.bytes_per_second / 1e9:.4g} GB/s)"
        )


def crossover(
    weights: Weights, bank: AdapterBank, k: int, *, mode: str = "exact", rates: Rates | None = None, launches: int | None = None
) -> Crossover:
    """From how many tokens per mixture on merging is cheaper than fused application, in decoding at batch 1.

    weights: the model (or its tensors by name) that `bank` adapts; k: experts in a mixture; mode: the Switcher's. rates: what the device
    does; by default measured, once in a process, in about a second. launches: how many more a fused step has than the backbone's; by
    default one for each target, as `lora_linear` has (a decoder's groups add fewer: docs/fused.md). A batch whose tokens share one mixture
    counts as one token a step.

    Raises UnknownNameError for targets that the model lacks; InvalidValueError for k outside [1, N] or another mode.
    """
    sizes = target_sizes(weights, bank)
    if isinstance(k, bool) or not isinstance(k, int):
        raise InvalidTypeError("crossover", "k", "an int", type(k).__name__)
    if not 1 <= k <= len(bank):
        raise InvalidValueError("crossover", "k", f"1 to {len(bank)} (the bank's adapters)", k)
    device = bank.target(bank.targets[0]).a.device
    rates = rates or measure_rates(device)
    switch = switch_work(sizes, k, mode)
    fused = fused_work(sizes, k, len(bank), launches=launches, second_pass=reads_twice(device))
    switch_seconds, extra = switch.seconds(rates), fused.seconds(rates)
    return Crossover(switch_seconds / extra, switch_seconds, extra, switch, fused, rates)


def target_sizes(weights: Weights, bank: AdapterBank) -> list[TargetSize]:
    """The sizes of a bank's targets. Raises UnknownNameError for targets that the model lacks."""
    found = collect(weights, "crossover")
    sizes = []
    for name in bank.targets:
        if name not in found:
            raise UnknownNameError("crossover", "targets", "weights that the model has", f"no {name}")
        target = bank.target(name)
        sizes.append(TargetSize(*target.spec.shape, target.a.shape[1], found[name].tensor.element_size(), target.a.element_size()))
    return sizes


def switch_work(targets: Iterable[TargetSize], k: int, mode: str = "exact") -> Work:
    """One switch to a mixture of k experts: every weight is read (from the base, if exact) and written, the experts' factors are read.

    In place, the last mixture's k experts are read again, to be subtracted.
    """
    if mode not in ("exact", "inplace"):
        raise InvalidValueError("switch_work", "mode", '"exact" or "inplace"', repr(mode))
    experts, nbytes, flops = k if mode == "exact" else 2 * k, 0, 0
    for target in targets:
        elements = target.rows * target.cols
        nbytes += 2 * elements * target.weight_itemsize + experts * factor_bytes(target)
        flops += 2 * elements * target.rank * experts
    return Work(nbytes, flops, 1)


def fused_work(
    targets: Sequence[TargetSize],
    k: int,
    num_adapters: int,
    tokens: int = 1,
    *,
    launches: int | None = None,
    second_pass: bool = False,
) -> Work:
    """What one decode step of `tokens` tokens costs beyond the backbone's: the chosen experts' factors, and `launches` (one a target).

    Tokens are taken to route at random (`distinct_experts`). second_pass: 16-bit weights are read twice (`reads_twice`).
    """
    experts = distinct_experts(num_adapters, k, tokens)
    nbytes = sum(experts * factor_bytes(target) for target in targets)
    if second_pass:
        nbytes += sum(t.rows * t.cols * t.weight_itemsize for t in targets if t.weight_itemsize == 2)
    flops = sum(2 * tokens * k * target.rank * (target.rows + target.cols) for target in targets)
    return Work(nbytes, flops, len(targets) if launches is None else launches)


def reads_twice(device: torch.device) -> bool:
    """Whether `lora_linear` reads a 16-bit weight twice, for its one rounding: on the CPU, where the extension was not built."""
    return device.type == "cpu" and backend.extension() is None


def distinct_experts(num_adapters: int, k: int, tokens: int) -> float:
    """How many of N adapters at least one of `tokens` tokens chooses, on average, if each token chooses k of them at random."""
    return num_adapters * (1 - (1 - k / num_adapters) ** tokens)


def factor_bytes(target: TargetSize) -> int:
    """Bytes of one adapter's A and B on one target."""
    return target.rank * (target.rows + target.cols) * target.factor_itemsize


# ---------------------------------------------------------------------- calibration


def measure_rates(device: torch.device | str) -> Rates:
    """A device's rates, measured once in a process (again after torch.set_num_threads): a copy, a matrix product, a launch."""
    import torch

    return _measure(str(torch.device(device)), torch.get_num_threads())


@functools.cache
def _measure(device: str, _threads: int) -> Rates:
    import torch

    on_cpu = torch.device(device).type == "cpu"
    nbytes, side = (64 << 20, 1024) if on_cpu else (512 << 20, 4096)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(side, side, dtype=torch.float32 if on_cpu else torch.bfloat16, device=device)
    product = torch.empty_like(matrix)
    with torch.no_grad():
        bandwidth = 2 * nbytes / _seconds(lambda: target.copy_(source), device)
        multiply = _seconds(lambda: torch.mm(matrix, matrix, out=product), device)
        if on_cpu:  # one token's products do not keep up with a copy there
            weight, x = source.view(torch.bfloat16).view(-1, 4096), torch.zeros(1, 4096, dtype=torch.bfloat16)
            bandwidth = min(bandwidth, nbytes / _seconds(lambda: torch.nn.functional.linear(x, weight), device))
        launch = _call_seconds() if on_cpu else _launch_seconds(device)
    return Rates(bandwidth, 2 * side**3 / multiply, launch)


def _seconds(run: Callable[[], object], device: str, trials: int = 5) -> float:
    """The least time of `run`."""
    import torch

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    best = math.inf
    run()
    for _ in range(trials):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _call_seconds() -> float:
    """What a call of lora_linear on the CPU takes longer than the linear alone, with small factors, and nothing in the cache."""
    import torch

    from fusedmerge.ops import lora_linear

    x, ids, gates = torch.ones(1, 512), torch.tensor([[0, 1]], dtype=torch.int32), torch.ones(1, 2)
    layers = [(torch.ones(512, 512), torch.ones(2, 1, 512), torch.ones(2, 512, 1)) for _ in range(64)]  # 64 MB
    whole = _seconds(lambda: [lora_linear(x, *layer, ids, gates) for layer in layers], "cpu")
    plain = _seconds(lambda: [torch.nn.functional.linear(x, weight) for weight, _, _ in layers], "cpu")
    return max(0.0, whole - plain) / len(layers)


def _launch_seconds(device: str) -> float:
    """One small kernel's share of a CUDA graph of many."""
    import torch

    number, launches = torch.zeros(1, device=device).add_(1), 200  # added to once before: kernels are loaded at their first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(launches):
            number.add_(1)
    return _seconds(graph.replay, device) / launches
