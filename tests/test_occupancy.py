"""The occupancy sheet: blocks worked out by hand and by NVIDIA's own header, bytes in flight, and scoreboards of kernels that are known."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from perf import cubin, occupancy
from perf.cubin import INCLUDE, ROOT
from perf.launches import Launch, launches
from perf.occupancy import LIMITS, resident

HEADERS = INCLUDE / "fusedmerge/kernel"
PAGE = ROOT / "docs/kernels/occupancy.md"


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "by"),
    [
        ("sm_90a", 256, 128, 0, 2, "registers"),  # 8 warps x 4096 registers = half of the file
        ("sm_90a", 256, 129, 0, 1, "registers"),  # 136 a thread: 3 warps of each quarter, 12 in all
        ("sm_90a", 256, 255, 0, 1, "registers"),
        ("sm_90a", 256, 32, 0, 8, "registers, threads"),
        ("sm_120", 256, 32, 0, 6, "threads"),
        ("sm_90a", 96, 104, 0, 5, "registers"),  # 4 warps of each quarter: 16, not the 19 that the whole file would hold
        ("sm_90a", 32, 16, 0, 32, "blocks"),
        ("sm_120", 32, 16, 0, 24, "blocks"),
        ("sm_90a", 256, 32, 115_712, 2, "shared"),  # 113 KB and the system's 1 KB, twice: 228 KB
        ("sm_90a", 256, 32, 115_713, 1, "shared"),
        ("sm_80", 256, 32, 166_912, 1, "shared"),  # 163 KB
        ("sm_80", 256, 32, 166_913, 0, "shared"),
    ],
)
def test_blocks_by_hand(arch, threads, registers, shared, blocks, by):
    assert resident(LIMITS[arch], threads, registers, shared) == (blocks, by)


# NVIDIA's calculator. The device's opt-in limit counts the system's 1 KB, too, in this header alone.
CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, threads, registers, shared, per_multiprocessor, per_block, most;
    while (std::scanf("%d %d %d %d %d %d %d", &major, &threads, &registers, &shared, &per_multiprocessor, &per_block, &most) == 7) {
        cudaOccDeviceProp device;
        device.computeMajor = major;
        device.computeMinor = 0;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = most;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 << 10;
        device.sharedMemPerMultiprocessor = per_multiprocessor;
        device.numSms = 132;
        device.sharedMemPerBlockOptin = per_block;
        device.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = threads;
        kernel.numRegs = registers;
        kernel.sharedSizeBytes = 0;
        kernel.maxDynamicSharedSizeBytes = per_block;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        cudaOccDeviceState state;
        cudaOccResult result;
        result.activeBlocksPerMultiprocessor = -1;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
        std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_blocks_are_nvidia_s(tmp_path):
    places = ["/usr/local/cuda/include", *map(str, Path("/usr/local").glob("cuda-*/include")), *map(str, cubin.SITE.glob("cu*/include"))]
    place = next((place for place in places if Path(place, "cuda_occupancy.h").exists()), None) or pytest.skip("no cuda_occupancy.h")
    compiler = shutil.which("g++") or pytest.skip("no g++")
    source = tmp_path / "calculator.cpp"
    source.write_text(CALCULATOR)
    subprocess.run([compiler, f"-I{place}", "-o", tmp_path / "calculator", source], check=True)
    asked, ours = [], []
    for arch, limits in LIMITS.items():
        for threads in (32, 96, 128, 256, 512):
            for registers in (16, 40, 85, 104, 128, 129, 168, 255):
                for shared in (0, 24 << 10, 33 << 10, 71_968, 92_160, 98 << 10, 99 << 10, 163 << 10, 226 << 10):
                    if shared > limits.block_shared:
                        continue  # the calculator refuses what a launch would
                    optin = limits.block_shared + 1024
                    asked.append((int(arch[3:].rstrip("a")) // 10, threads, registers, shared, limits.shared, optin, limits.threads))
                    ours.append(resident(limits, threads, registers, shared).blocks)
    lines = "\n".join(" ".join(map(str, row)) for row in asked)
    said = subprocess.run([tmp_path / "calculator"], input=lines, capture_output=True, text=True, check=True).stdout
    theirs = [int(line) for line in said.split()]
    assert len(theirs) == len(ours) > 1000
    assert [(a, t, o) for a, t, o in zip(asked, theirs, ours, strict=True) if t != o] == []


# ---- launches and bytes in flight ------------------------------------------------------------------------------------


def noted(kilobytes: int) -> list[Launch]:
    pytest.importorskip("fusedmerge._ext")  # the planner
    return launches(kilobytes << 10)


def test_every_kernel_is_in_the_sheet():
    names = [launch.name for launch in noted(227)]
    files = "".join((ROOT / f"cuda/src/{file}").read_text() for file in ("kernels_linear.cu", "kernels_sgmv.cu"))
    stated = {name for name in re.findall(r'named_kernel<.*>\("(\w+)"', files) if "fp16" not in name}
    assert len(stated) == 15 and stated == {name for name in names if not name.startswith("switch")}
    assert len(set(names)) == len(names)


def test_shared_memory_and_grids_are_the_launcher_s():
    large, small = ({launch.name: launch for launch in noted(limit)} for limit in (227, 99))
    assert (large["switch, in place"].shared, small["switch, in place"].shared) == (91_520 + 135_168, 91_520)  # two chunks of ranks, or one
    assert (large["gemv_bf16_8"].shared, large["gemv_bf16_8"].asked, small["gemv_bf16_8"].asked) == (95_040, 2, 1)
    assert (large["sgmv_expand_bf16_64"].shared, small["sgmv_expand_bf16_16"].shared) == (96 << 10, 48 << 10)  # tokens of a tile, 1 KB each
    assert large["prologue_bf16_8"].asked == large["switch, exact"].asked == 1


def block_bytes(name: str, headers: Path = HEADERS) -> list[int]:
    return [256 * stream.loads * stream.bytes for stream in occupancy.streams(name, headers) if stream.loads is not None]


# By hand, from the headers' descriptions. A constant that changes there changes the sheet, and must change here.
FLIGHT = {
    "switch, exact": [64 * 256 * 2],  # a step of base
    "switch, in place": [64 * 256 * 2],
    "switch, fp8 base": [64 * 256],
    "switch, float32 factors": [],
    "prologue_bf16_8": [16 * 2048 * 2],  # a unit of A
    "prologue_bf16_16": [16 * 2048 * 2],
    "gemv_bf16_8": [3 * 32 * 256 * 2],  # three steps of W
    "gemv_bf16_16": [2 * 32 * 256 * 2],
    "sgmv_shrink_bf16_16": [8 * 3 * (16 + 16) * 32 * 2, 3 * 8 * 16 * 32 * 2],  # three steps of eight warps; with A shared: x alone
    "sgmv_shrink_bf16_64": [8 * 2 * (64 + 16) * 32 * 2, 2 * (64 + 8 * 16) * 32 * 2],  # two
    "sgmv_expand_bf16_16": [16 * 256 * 2],  # a factor's ranks; rows of y by the machine code
    "sgmv_expand_bf16_64": [64 * 256 * 2],
    "group_scan": [],
}


def test_bytes_in_flight_by_hand():
    assert {name: block_bytes(name) for name in FLIGHT} == FLIGHT
    assert {launch.name for launch in noted(227) if occupancy.streams(launch.name)} == {name for name, b in FLIGHT.items() if b}


@pytest.mark.parametrize(
    ("header", "old", "new", "name", "expected"),
    [
        ("gemv.cuh", "kTokenTiles == 1 ? 4 : 3", "kTokenTiles == 1 ? 3 : 3", "gemv_bf16_8", [2 * 16384]),
        ("linear_params.cuh", "kSplitCols = 2048", "kSplitCols = 1024", "prologue_bf16_8", [32 << 10]),
        ("params.cuh", "kStepRows = 64", "kStepRows = 32", "switch, exact", [16 << 10]),
        (
            "sgmv_shrink.cuh",
            "kRanks == kFewRanks ? 3 : 2",
            "kRanks == kFewRanks ? 4 : 2",
            "sgmv_shrink_bf16_16",
            [8 * 4 * 32 * 64, 9 << 12],
        ),
        ("sgmv_params.cuh", "kShrinkPairs = 16", "kShrinkPairs = 8", "sgmv_shrink_bf16_64", [8 * 2 * 72 * 64, 2 * (64 + 64) * 64]),
        ("sgmv_expand.cuh", "kBlocks = kRanks / 16", "kBlocks = kRanks / 32", "sgmv_expand_bf16_64", [16 << 10]),
    ],
)
def test_a_header_s_constant_reaches_the_sheet(tmp_path, header, old, new, name, expected):
    headers = tmp_path / "kernel"
    shutil.copytree(HEADERS, headers)
    text = (headers / header).read_text()
    assert text.count(old) == 1
    (headers / header).write_text(text.replace(old, new))
    assert block_bytes(name, headers) == expected != FLIGHT[name]


# ---- scoreboards -----------------------------------------------------------------------------------------------------


def listing(*lines: tuple[str, int, Sequence[int]]) -> str:
    """SASS of (text, scoreboard that is written, scoreboards that are waited for)."""
    text = ""
    for i, (instruction, writes, waits) in enumerate(lines):
        control = writes << 46 | sum(1 << 52 + scoreboard for scoreboard in waits)
        text += f"        /*{16 * i:04x}*/      {instruction} ;      /* 0x{0:016x} */\n      /* 0x{control:016x} */\n"
    return text


MMA, USE, EXIT = ("HMMA.16816.F32 R0, R4, R8, R0", 7, ()), "FADD R2, R4, R5", ("EXIT", 7, ())


def load(scoreboard: int, *waits: int) -> tuple[str, int, Sequence[int]]:
    return "LDG.E.128 R4, desc[UR4][R2.64]", scoreboard, waits


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([MMA, load(5), load(5), load(3)], 3),
        ([MMA, load(5), (USE, 7, [5]), load(5)], 1),
        ([MMA, load(5), (USE, 7, [4]), load(5)], 2),
        ([MMA, load(5), load(4, 5)], 1),  # the second waits itself
        ([load(5), load(5), MMA, load(4)], 3),  # what came before is still under way
        ([load(5), load(5), MMA], 0),  # no load follows
        ([MMA, load(5), ("@P0 BRA 0x40", 7, ()), (USE, 7, [5]), load(5)], 2),  # a path around the wait
        ([MMA, load(5), ("BRA 0x40", 7, ()), load(5), load(5)], 2),  # the one between is never reached
        ([MMA, load(5), ("DEPBAR.LE SB5, 0x1", 7, ()), ("@P0 BRA 0x10", 7, ())], 2),
    ],
)
def test_loads_in_flight(lines, expected):
    assert cubin.loads_in_flight(listing(*lines, EXIT), r"LDG\.E\.128", "HMMA") == expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", LIMITS)
def test_scoreboards_of_kernels_that_are_known(tmp_path, arch):
    """The micro-benchmarks' copies hold 4 and 8 loads in flight by design."""
    nvcc, cuobjdump = tools()
    copies = cubin.functions(cuobjdump, cubin.compile_cubin(nvcc, ROOT / "perf/micro/copy.cu", arch, tmp_path / "copy.cubin")[0])
    assert [cubin.loads_in_flight(copies[f"copy_plain_{n}"], r"LDG\.E\.128", "LDG") for n in (4, 8)] == [4, 8]
    assert cubin.loads_in_flight(copies["tiled_copy_lanes"], r"LDG\.E\.NA\.128", "LDG") == 8


@pytest.mark.slow
def test_the_page_is_what_the_program_prints(capsys):
    tools()
    pytest.importorskip("fusedmerge._ext")
    written = re.findall(r"with nvcc ([\d.]+)\. ", PAGE.read_text())
    if written != [occupancy.compiler()]:
        pytest.skip(f"the page was written with nvcc {written}, here is {occupancy.compiler()}")
    occupancy.main([])
    assert capsys.readouterr().out == PAGE.read_text()


def tools() -> tuple[str, str]:
    nvcc = cubin.find_tool("nvcc") or pytest.skip("nvcc is not installed")
    return nvcc, cubin.find_tool("cuobjdump") or pytest.skip("cuobjdump is not installed (pip: nvidia-cuda-cuobjdump)")
