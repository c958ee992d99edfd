"""What the CUDA compilers make of SGMV's kernels: registers, no spills; tensor cores and 16-byte accesses where they belong."""

from __future__ import annotations

import re
import subprocess

import pytest

from perf import cubin as machine_code
from tests import test_compile

nvcc, cuobjdump = test_compile.nvcc, test_compile.cuobjdump

# Registers of a thread at most: two blocks share a multiprocessor; one of the shrink with 64 ranks has it alone.
CEILING = {"group": 96, "shrink, 16": 128, "shrink, 64": 255, "sum": 64, "expand, 16": 128, "expand, 64": 128}


@pytest.mark.slow
@pytest.mark.parametrize("arch", test_compile.ARCHITECTURES)
def test_every_kernel(nvcc, cuobjdump, tmp_path, arch):
    cubin, report = test_compile.compile_cubin(nvcc, test_compile.ROOT / "cuda/src/kernels_sgmv.cu", arch, tmp_path / "sgmv.cubin")
    found = test_compile.kernels(report)
    assert len(found) == 15
    for name, figures in found.items():
        kind, ranks = re.search(r"(group|shrink|sum|expand)(?:.*Li(\d+)E)?", name).groups()
        kind += f", {ranks}" if ranks else ""
        assert (figures["stack"], figures["stores"], figures["loads"]) == (0, 0, 0), (name, figures)
        assert figures["registers"] <= CEILING[kind], (name, figures)
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function : ")[1:]:
        name, wide = part.split("\n", 1)[0].strip(), len(re.findall(r"\bLDG\.E\.[\w.]*128", part))
        products = len(re.findall(r"\bHMMA\.16816\.F32", part))
        assert not re.search(r"\b(STL|LDL)\b", part), name
        few = "Li16E" in name
        if "shrink" in name:
            assert products >= (12 if few else 32) and wide >= (20 if few else 30), (name, products, wide)
            ahead = machine_code.loads_in_flight(part, r"LDG\.E\.128", "HMMA")
            assert ahead >= (12 if few else 20), (name, ahead)  # three steps of 32 columns, or two
        elif "expand" in name:
            assert products == (8 if few else 16) and re.search(r"\bSTG\.E\.[\w.]*128", part), (name, products)
            assert len(re.findall(r"\bLDG\.E\.64", part)) >= (4 if few else 16), name  # B
            assert machine_code.loads_in_flight(part, r"LDG\.E\.NA\.128", "HMMA") >= 4, name  # y
            assert re.search(r"\bLDS\.128", part) and re.search(r"\bSTS\.128", part), name
        else:
            assert products == 0 and wide >= ("sum" in name), (name, wide)
