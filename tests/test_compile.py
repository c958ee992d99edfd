"""What the CUDA compilers make of the kernels: registers, spills, tensor-core and 16-byte instructions; headers alone with NVRTC."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from pathlib import Path

import pytest

from perf.cubin import INCLUDE, ROOT, SITE, compile_cubin, find_tool, kernels

HEADERS = sorted((INCLUDE / "fusedmerge/kernel").glob("*.cuh"))

# Registers of a thread at most; with 256 threads a block, 255 is the hardware's limit.
CEILING = {"mma": 255, "simt": 168}
ARCHITECTURES = ["sm_90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100", "sm_120"))]
REPRESENTATIVE = """
#include "fusedmerge/kernel/switch.cuh"
using namespace fusedmerge;
template __global__ void fusedmerge::switch_kernel<Bf16, Bf16, Bf16>(SwitchParams);
template __global__ void fusedmerge::switch_kernel<Fp16, Fp8E4M3, Fp16>(SwitchParams);
template __global__ void fusedmerge::switch_kernel<float, float, float>(SwitchParams);
"""
# What the JIT path makes: mode and depth fixed.
SPECIALISED = """
#include "fusedmerge/kernel/switch.cuh"
using namespace fusedmerge;
extern "C" FM_KERNEL(kThreads) exact(const SwitchParams params) { run_switch<Bf16, Bf16, Bf16, 0, 1>(params); }
extern "C" FM_KERNEL(kThreads) exact_deep(const SwitchParams params) { run_switch<Bf16, Bf16, Bf16, 0, 2>(params); }
extern "C" FM_KERNEL(kThreads) inplace(const SwitchParams params) { run_switch<Bf16, Bf16, Bf16, 1, 1>(params); }
"""

INSTRUCTIONS = r"\b(HMMA\.16816\.F32|LDG\.E\.[\w.]*128|STG\.E\.[\w.]*128|LDGSTS\.E[\w.]*128|LDSM\.16\.M88\.4|STL|LDL)\b"


@pytest.fixture(scope="module")
def nvcc():
    return find_tool("nvcc") or pytest.skip("nvcc is not installed")


@pytest.fixture(scope="module")
def cuobjdump():
    return find_tool("cuobjdump") or pytest.skip("cuobjdump is not installed (pip: nvidia-cuda-cuobjdump)")


@pytest.fixture(scope="module")
def compile_representative(nvcc, tmp_path_factory):
    @functools.cache
    def compiled(arch: str) -> tuple[Path, str]:
        place = tmp_path_factory.mktemp(arch)
        source = place / "representative.cu"
        source.write_text(REPRESENTATIVE)
        return compile_cubin(nvcc, source, arch, place / "representative.cubin")

    return compiled


def check_figures(report: str, count: int) -> None:
    found = kernels(report)
    assert len(found) == count
    for name, figures in found.items():
        kind = "simt" if re.search("fEEvN", name) else "mma"  # the last template argument, mangled: f is float32
        assert (figures["stack"], figures["stores"], figures["loads"]) == (0, 0, 0), (name, figures)
        assert figures["registers"] <= CEILING[kind], (name, figures)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_and_spills(compile_representative, arch):
    check_figures(compile_representative(arch)[1], 3)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_instructions(compile_representative, cuobjdump, arch):
    text = subprocess.run([cuobjdump, "-sass", str(compile_representative(arch)[0])], capture_output=True, text=True, check=True).stdout
    bodies = {part.split("\n", 1)[0].strip(): part for part in text.split("Function : ")[1:]}
    assert len(bodies) == 3
    for name, body in bodies.items():
        found = set(re.findall(INSTRUCTIONS, body))
        kinds = {item.split(".")[0] for item in found}
        assert not kinds & {"STL", "LDL"}, name
        if "IfffE" in name:
            assert kinds >= {"LDG", "STG"}, (name, found)
            assert "FFMA" in body
        else:
            assert kinds >= {"HMMA", "STG", "LDGSTS", "LDSM"}, (name, found)
            assert "LDG" in kinds or "Fp8" in name, (name, found)
            assert len(re.findall(r"\bHMMA\.16816\.F32", body)) >= 128  # eight slices of sixteen, unrolled


@pytest.mark.slow
def test_kernels_with_mode_and_depth_fixed(nvcc, tmp_path):
    source = tmp_path / "specialised.cu"
    source.write_text(SPECIALISED)
    report = compile_cubin(nvcc, source, "sm_90a", tmp_path / "specialised.cubin")[1]
    check_figures(report, 3)
    assert kernels(report)["exact"]["registers"] < CEILING["mma"]  # less than the kernel that decides at launch


@pytest.mark.slow
def test_every_instance_compiles(nvcc, tmp_path):
    check_figures(compile_cubin(nvcc, ROOT / "cuda/src/instances.cu", "sm_90a", tmp_path / "instances.cubin")[1], 16)


def test_headers_include_only_each_other():
    for header in HEADERS:
        included = re.findall(r'#include\s+[<"]([^">]+)', header.read_text())
        allowed = {h.name for h in HEADERS} | {"cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"}
        if header.name == "platform.cuh":
            allowed.add("simulator.h")  # the host simulator's branch
        assert set(included) <= allowed, header.name


def test_ptx_lives_in_one_place():
    for header in HEADERS:
        if header.name not in ("ptx.cuh", "platform.cuh"):
            assert not re.search(r"\basm\b|__shfl|__syncthreads|threadIdx|#if", header.read_text()), header.name


@pytest.fixture(scope="module")
def nvrtc():
    packaged = [*sorted(SITE.glob("cu*/lib/libnvrtc.so.*")), *sorted(SITE.glob("cuda_nvrtc/lib/libnvrtc.so.*"))]
    candidates = [*packaged, "libnvrtc.so.13", "libnvrtc.so.12"]
    for candidate in candidates:
        try:
            return ctypes.CDLL(str(candidate))
        except OSError:
            continue
    pytest.skip("NVRTC is not installed (pip: nvidia-cuda-nvrtc)")


@pytest.mark.parametrize("arch", ["compute_80", "compute_90", "compute_100", "compute_120"])
def test_each_header_alone_with_nvrtc(nvrtc, arch):
    for header in HEADERS:
        program = ctypes.c_void_p()
        source = f'#include "fusedmerge/kernel/{header.name}"\n'.encode()
        assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"alone.cu", 0, None, None) == 0
        flags = [f"--gpu-architecture={arch}".encode(), f"-I{INCLUDE}".encode(), b"--std=c++17"]
        code = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        assert code == 0, f"{header.name} for {arch}:\n{log.value.decode()}"
