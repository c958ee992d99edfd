"""What the tests of the perf suites share: a toy backbone, ceilings, and a benchmark without a report."""

from __future__ import annotations

import torch

from perf.backbones import LLAMA_2_7B
from perf.model import Ceilings

CPU = torch.device("cpu")
TOY = LLAMA_2_7B.scaled(64, 2)
CEILINGS = Ceilings(copy=1e10, read=1e10, flops=1e11, flops_float32=1e11)


class Benchmark:
    """pytest-benchmark's pedantic, without its report."""

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            arguments, keywords = setup()
            target(*arguments, **keywords)
