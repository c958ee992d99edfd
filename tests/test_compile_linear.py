"""What the CUDA compilers make of fused application's kernels: registers, spills, instructions, and what comes before the wait."""

from __future__ import annotations

import functools
import re
import subprocess

import pytest

from fusedmerge.backend import compiler
from tests import test_compile

nvcc, cuobjdump = test_compile.nvcc, test_compile.cuobjdump

# Registers of a thread at most: two blocks of 256 threads on a multiprocessor leave 128.
CEILING = {"route": 128, "prologue": 128, "gemv": 128}
SOURCE = """
#include "fusedmerge/kernel/lora_linear.cuh"
using namespace fusedmerge;
template __global__ void fusedmerge::route_kernel<Bf16>(RouteParams);
template __global__ void fusedmerge::prologue_kernel<Bf16, 1>(const FM_GRID_CONSTANT LinearParams);
template __global__ void fusedmerge::prologue_kernel<Fp16, 2>(const FM_GRID_CONSTANT LinearParams);
template __global__ void fusedmerge::gemv_kernel<Bf16, 1>(const FM_GRID_CONSTANT LinearParams);
template __global__ void fusedmerge::gemv_kernel<Fp16, 2>(const FM_GRID_CONSTANT LinearParams);
"""
INSTRUCTIONS = r"\b(HMMA\.16816\.F32|LDG\.E\.[\w.]*128|LDGSTS\.E[\w.]*128|ACQBULK|PREEXIT|STL|LDL)\b"


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    @functools.cache
    def compile_for(arch: str):
        place = tmp_path_factory.mktemp(arch)
        (place / "linear.cu").write_text(SOURCE)
        return test_compile.compile_cubin(nvcc, place / "linear.cu", arch, place / "linear.cubin")

    return compile_for


def kind_of(name: str) -> str:
    return next(kind for kind in CEILING if f"{kind}_kernel" in name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", test_compile.ARCHITECTURES)
def test_registers_and_spills(compiled, arch):
    found = test_compile.kernels(compiled(arch)[1])
    assert len(found) == 5
    for name, figures in found.items():
        assert (figures["stack"], figures["stores"], figures["loads"]) == (0, 0, 0), (name, figures)
        assert figures["registers"] <= CEILING[kind_of(name)], (name, figures)


@pytest.mark.slow
@pytest.mark.parametrize("arch", test_compile.ARCHITECTURES)
def test_instructions(compiled, cuobjdump, arch):
    text = subprocess.run([cuobjdump, "-sass", str(compiled(arch)[0])], capture_output=True, text=True, check=True).stdout
    bodies = {part.split("\n", 1)[0].strip(): part for part in text.split("Function : ")[1:]}
    assert len(bodies) == 5
    for name, body in bodies.items():
        order = [item.split(".")[0] for item in re.findall(INSTRUCTIONS, body)]
        assert not set(order) & {"STL", "LDL"} and "LDG" in order, (name, set(order))
        kind = kind_of(name)
        if kind == "route":
            continue
        assert {"HMMA", "LDGSTS"} <= set(order), (name, set(order))
        assert ("ACQBULK" in order, "PREEXIT" in order) == (arch != "sm_80",) * 2, name
        if arch != "sm_80":  # the GEMV fetches W, and W alone, before it waits; the prologue nothing
            assert order[: order.index("ACQBULK")] == (["LDGSTS"] * 4 if kind == "gemv" else []), (name, order)


@pytest.mark.slow
def test_the_library_s_instances_compile(nvcc, tmp_path):
    report = test_compile.compile_cubin(nvcc, test_compile.ROOT / "cuda/src/kernels_linear.cu", "sm_90a", tmp_path / "kernels.cubin")[1]
    found = test_compile.kernels(report)
    assert len(found) == 10
    for name, figures in found.items():
        assert (figures["stack"], figures["stores"], figures["loads"]) == (0, 0, 0) and figures["registers"] <= 128, (name, figures)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["run_prologue<Bf16, 1>", "run_gemv<Fp16, 2>"])
def test_the_jit_s_source_compiles(tmp_path, monkeypatch, call):
    pytest.importorskip("cupy").cuda.nvrtc  # noqa: B018 (skips where there is none)
    monkeypatch.setenv("FUSEDMERGE_CACHE_DIR", str(tmp_path))
    path = compiler.compiled(compiler.Kernel("lora_linear.cuh", "LinearParams", call, blocks=2), (9, 0))
    assert path.read_bytes()[:4] == b"\x7fELF" and compiler.ENTRY.encode() in path.read_bytes()
