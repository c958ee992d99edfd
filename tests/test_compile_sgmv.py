"""What the CUDA compilers make of SGMV's kernels: registers, no spills; tensor cores and 16-byte accesses where they belong."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests import test_compile

nvcc, cuobjdump = test_compile.nvcc, test_compile.cuobjdump

# Registers of a thread at most: two blocks of the expand share a multiprocessor, one of the shrink has it alone.
CEILING = {"group": 96, "shrink": 255, "sum": 64, "expand": 128}


@pytest.mark.parametrize("arch", test_compile.ARCHITECTURES)
def test_every_kernel(nvcc, cuobjdump, tmp_path, arch):
    cubin, report = test_compile.compile_cubin(nvcc, test_compile.ROOT / "cuda/src/kernels_sgmv.cu", arch, tmp_path / "sgmv.cubin")
    found = test_compile.kernels(report)
    assert len(found) == 9
    for name, figures in found.items():
        kind = re.search(r"group|shrink|sum|expand", name)[0]
        assert (figures["stack"], figures["stores"], figures["loads"]) == (0, 0, 0), (name, figures)
        assert figures["registers"] <= CEILING[kind], (name, figures)
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function : ")[1:]:
        name, wide = part.split("\n", 1)[0].strip(), len(re.findall(r"\bLDG\.E\.[\w.]*128", part))
        products = len(re.findall(r"\bHMMA\.16816\.F32", part))
        assert not re.search(r"\b(STL|LDL)\b", part), name
        if "shrink" in name:
            ahead = len(re.findall(r"\bLDG\.E\.[\w.]*128", part.split("HMMA", 1)[0]))
            assert products >= 32 and wide >= 30 and ahead >= 20, (name, products, wide, ahead)  # two steps of 32 columns are in flight
        elif "expand" in name:
            assert products == 16 and wide >= 12 and re.search(r"\bSTG\.E\.[\w.]*128", part), (name, products, wide)
            assert re.search(r"\bLDS\.128", part) and re.search(r"\bSTS\.128", part), name
        else:
            assert products == 0 and wide >= ("sum" in name), (name, wide)
