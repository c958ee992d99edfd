"""What a micro-benchmark is handed: a device, sizes, and a record that is on disk soon after each case."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.evidence import Suite, write

if TYPE_CHECKING:
    import torch

    from perf.micro.device import Device

__all__ = ["LLAMA_2_7B", "Session", "Sizes", "WrongResultError", "require"]

WRITE_INTERVAL = 2.0  # seconds between two writes of a results file


class WrongResultError(AssertionError):
    """A kernel's output is not what it should be: its times mean nothing."""


def require(condition: Any, what: str) -> None:
    """Raise WrongResultError unless `condition`."""
    if not bool(condition):
        raise WrongResultError(what)


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    copy_bytes: int  # of a source, and of a destination
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    context: int  # tokens in the KV cache of a decode step
    tiles: int  # of 512 products each, per kind of M3
    samples: int
    settle_seconds: float  # how long a load runs before clocks are believed

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of a layer's four linears, q/k/v and gate/up packed."""
        return {
            "qkv": (3 * self.hidden, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def parts(self) -> dict[str, int]:
        """Into how many matrices each is split when unpacked."""
        return {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}

    @property
    def layer_bytes(self) -> int:
        """The four linears' bf16 weights."""
        return sum(2 * rows * cols for rows, cols in self.shapes.values())

    def fitted(self, free_bytes: int) -> Sizes:
        """No more than the memory holds: two buffers of copy_bytes, or the backbone and a base, and some room."""
        share = min(1.0, 0.45 * free_bytes / self.copy_bytes)
        layers = max(1, int(self.layers * min(1.0, 0.4 * free_bytes / (self.layers * self.layer_bytes))))
        return replace(self, copy_bytes=int(share * self.copy_bytes), layers=layers)


# The seven linears of 32 layers are 12.95 GB.
LLAMA_2_7B = Sizes(
    copy_bytes=12_952_010_752, layers=32, hidden=4096, intermediate=11008, heads=32, vocabulary=32000, context=512,
    tiles=2048, samples=15, settle_seconds=0.7,
)  # fmt: skip


class Session:
    """One suite's run."""

    def __init__(self, name: str, title: str, device: Device, sizes: Sizes, results: Path, began: dict[str, Any]) -> None:
        self.device, self.sizes = device, sizes
        self.suite = Suite(name)
        self.suite.setting.update(text=title, sizes=dict(vars(sizes)), complete=False)
        self._results, self._began, self._written = results, began, 0.0
        self._copy_bandwidth = 0.0

    def record(self, name: str, group: str, title: str, seconds: list[float], **more: Any) -> dict[str, Any]:
        """Keep a case and print a line; `bytes` gives it a rate and its share of the copy's bandwidth."""
        if more.get("bytes"):
            more["fraction_of_copy"] = more["bytes"] / statistics.median(seconds) / self.copy_bandwidth
        case = self.suite.record(name, group, title, seconds, **more)
        rate = f"{more['bytes'] / case['median_ms'] / 1e6:9.1f} GB/s {more['fraction_of_copy']:6.1%} of copy" if more.get("bytes") else ""
        flops = f" {more['flops'] / case['median_ms'] / 1e9:7.1f} TFLOP/s" if more.get("flops") else ""
        print(f"{self.suite.name:9} {name:40} {case['median_ms']:11.5f} ms {rate}{flops}", flush=True)
        if time.monotonic() - self._written > WRITE_INTERVAL:
            self.write()
        return case

    def write(self) -> None:
        """The results file as it stands."""
        if self.suite.cases:
            write(self.suite, self._results, self._began)
            self._written = time.monotonic()

    def finish(self) -> None:
        """All cases are there."""
        self.suite.setting["complete"] = True
        self.write()

    @property
    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a device-to-device memcpy, measured once in this session."""
        if not self._copy_bandwidth:
            size = min(self.sizes.copy_bytes, 2 << 30)
            source, target = (self.buffer(size) for _ in range(2))
            self._copy_bandwidth = 2 * size / statistics.median(self.device.samples(lambda: target.copy_(source), 9))
            self.suite.setting["copy_bytes_per_second"] = self._copy_bandwidth
        return self._copy_bandwidth

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Random signed bf16, none of them zero."""
        import torch

        found = torch.empty(nbytes // 2, dtype=torch.bfloat16, device=self.device.where)
        for part in found.split(1 << 28):
            part.normal_()
            part.masked_fill_(part == 0, 1.0)
        return found

    def weight(self, *shape: int) -> torch.Tensor:
        """bf16 [..., out, in] of standard deviation in^-0.5: y = W x is about as large as x."""
        import torch

        return torch.empty(shape, dtype=torch.bfloat16, device=self.device.where).normal_(std=shape[-1] ** -0.5)
