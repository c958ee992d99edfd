"""Times of calls that take turns: CUDA events on a GPU, a clock on the CPU; as many rounds as fit; buffers that outgrow the cache."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Rotated", "Stopwatch", "cache_bytes", "chained", "device", "in_turn", "median_ratio", "replayed", "rotated", "rounds_within"]

LEAST_ROUNDS, MOST_ROUNDS = 5, 30
HEAD_START = 400_000  # cycles that the GPU sleeps while the host queues a call, about 0.2 ms
CACHES = 4  # how many times the cache the buffers must outgrow
MOST_SETS = 64
LEAST_CHAIN = 16
Thing = TypeVar("Thing")


def device() -> torch.device:
    """Where the suites run: the GPU if there is one."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Stopwatch:
    """Seconds of one call.

    On a GPU between two CUDA events, with the device asleep until the call is queued: a single launch is timed without its Python, and a
    call that queues more slowly than the GPU works is timed as slow as it is.
    """

    def __init__(self, where: torch.device) -> None:
        import torch

        self._gpu = where.type == "cuda"
        if self._gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> float:
        import torch

        if not self._gpu:
            start = time.perf_counter()
            call(*arguments)
            return time.perf_counter() - start
        begin, end = self._events
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call(*arguments)
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


def in_turn(
    benchmark: Any,
    calls: Mapping[str, Callable[[int], Any]],
    where: torch.device,
    rounds: int = 0,
    seconds: float = 2.0,
    before: Mapping[str, Callable[[int], Any]] | None = None,
) -> dict[str, list[float]]:
    """Samples of every call, in seconds. In each round every call runs once, with the round's number, in an order that changes.

    Two rounds come first that are not counted (compilation, caches); the second tells how many rounds fit into `seconds` (at least 5, at
    most 30), unless `rounds` says. pytest-benchmark times the first of the calls, and its setup the others. before: what some of the
    calls need done first, untimed.
    """
    watch = Stopwatch(where)

    def timed(name: str, number: int) -> float:
        if before and name in before:
            before[name](number)
        return watch(calls[name], number)

    for number in (0, 1):
        start = time.perf_counter()
        for name in calls:
            timed(name, number)
        warm = time.perf_counter() - start
    count = rounds or rounds_within(seconds, warm)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    first, *others = calls
    numbers = iter(range(2, count + 2))

    def setup() -> tuple[tuple[int], dict[str, Any]]:
        number = next(numbers)
        turn = number % len(others) if others else 0
        for name in others[turn:] + others[:turn]:
            samples[name].append(timed(name, number))
        return (number,), {}

    benchmark.pedantic(lambda number: samples[first].append(timed(first, number)), setup=setup, rounds=count, iterations=1)
    return samples


def rounds_within(seconds: float, round_seconds: float) -> int:
    """How many rounds of this length fit, within the limits."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(round_seconds, 1e-9))))


def median_ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """The median, over rounds, of one call's time to another's in the same round."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def cache_bytes(where: torch.device) -> int:
    """The last-level cache: a GPU's L2, or the largest that the system tells of the first core's; 0 if it tells none."""
    import torch

    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes)


class Rotated(Generic[Thing]):
    """Things that take turns: the one for a round's number."""

    def __init__(self, made: Sequence[Thing]) -> None:
        self._made = made

    def __call__(self, number: int) -> Thing:
        return self._made[number % len(self._made)]

    def __len__(self) -> int:
        return len(self._made)


def rotated(make: Callable[[int], Thing], nbytes: float, where: torch.device) -> Rotated[Thing]:
    """Enough of what `make` makes, each of `nbytes`, that together they outgrow the cache four times; the result picks one by round number.

    At most 64 of them, and no more than an eighth of the memory holds.
    """
    room = _memory(where) // 8
    count = max(1, min(math.ceil(CACHES * cache_bytes(where) / nbytes), MOST_SETS, int(room / nbytes)))
    return Rotated([make(index) for index in range(count)])


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """The call in a CUDA graph. It runs once before, outside."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def chained(calls: Mapping[str, Callable[[int], Any]], sets: int, where: torch.device) -> tuple[dict[str, Callable[[int], Any]], int]:
    """What to time, and how many calls that is: on a GPU a CUDA graph with a call for each set of buffers, at least 16 of them, so that a
    launch's own time and the events' resolution do not count; on a CPU one call."""
    if where.type != "cuda":
        return dict(calls), 1
    count = max(LEAST_CHAIN, sets)

    def chain(call: Callable[[int], Any]) -> Callable[[int], Any]:
        def every() -> None:
            for number in range(count):
                call(number)

        replay = replayed(every)
        return lambda _: replay()

    return {name: chain(call) for name, call in calls.items()}, count


def _memory(where: torch.device) -> int:
    import torch

    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
