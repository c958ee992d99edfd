"""The micro-benchmarks without a GPU: their host side over twins of the kernels, on the CPU; what nvcc makes of the kernels."""

from __future__ import annotations

import ctypes
import functools
import json
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusedmerge.commands import plot
from perf.cubin import ROOT, compile_cubin, find_tool, kernels
from perf.evidence import begin
from perf.micro import device, driver, m1_tiles, m2_multiply, m3_products, m4_gemv, m5_handover
from perf.micro.__main__ import BENCHMARKS, KERNEL_FILES, main, run
from tests import kit, micro_kit

ARCHITECTURES = ["sm_90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100", "sm_120"))]
# Instructions without which a kernel would not measure what it says; on sm_90a also the bulk copies, wgmma and the programmatic edge.
EXPECTED = {
    "copy_plain_8": {r"LDG\.E\.128": 16, r"STG\.E\.128": 8},
    "read_plain_8": {r"LDG\.E\.128": 16},
    "copy_ring_8": {r"LDGSTS\.E\.BYPASS\.128": 16, r"STG\.E\.128": 2},
    "read_ring_16": {r"LDGSTS\.E\.BYPASS\.128": 4, r"LDS\.128": 2},
    "tiled_copy_lanes": {r"LDG\.E\.[\w.]*128": 16, r"STG\.E\.[\w.]*128": 8, r"LDGSTS\.E\.BYPASS\.128": 1},
    "multiply_copy": {r"HMMA\.16816\.F32\.BF16": 128, r"LDSM\.16\.M88\.4": 32, r"LDG\.E\.[\w.]*128": 16, r"STG\.E\.[\w.]*128": 8},
    "mma_peak": {r"HMMA\.16816\.F32\.BF16": 64},
    "products_fp16": {r"HMMA\.16816\.F32": 1},
    "gemv_plain": {r"LDG\.E\.[\w.]*128": 32, r"HMMA\.16816\.F32\.BF16": 16},
}
EXPECTED_SM_90 = {
    "copy_bulk": {r"UBLKCP\.S\.G": 1, r"UBLKCP\.G\.S": 1},
    "read_bulk": {r"UBLKCP\.S\.G": 1, r"LDS\.128": 2},
    "gemv_bulk": {r"UBLKCP\.S\.G": 1, r"HMMA\.16816\.F32\.BF16": 2, "ACQBULK": 1, "PREEXIT": 1},
    "gemv_plain": {"ACQBULK": 1, "PREEXIT": 1},
    "nothing": {"ACQBULK": 1, "PREEXIT": 1},
}
EXPECTED_WGMMA = {"wgmma_peak": {r"HGMMA\.64x256x16\.F32\.BF16": 16}, "products_bf16": {r"HGMMA\.64x8x16\.F32\.BF16": 1}}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Architecture -> (ptxas' figures, SASS, where the cubins are): each kernel's."""
    nvcc = find_tool("nvcc") or pytest.skip("nvcc is not installed")
    cuobjdump = find_tool("cuobjdump") or pytest.skip("cuobjdump is not installed (pip: nvidia-cuda-cuobjdump)")

    @functools.cache
    def build(arch):
        report, sass, place = "", "", tmp_path_factory.mktemp("micro")
        for name in KERNEL_FILES:
            cubin, said = compile_cubin(nvcc, ROOT / f"perf/micro/{name}.cu", arch, place / f"{name}.cubin")
            assert "C75" not in said, said  # wgmma that is serialised
            report += said
            sass += subprocess.run([cuobjdump, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
        return kernels(report), {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}, place

    return build


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels(compiled, arch):
    figures, sass, _ = compiled(arch)
    assert set(figures) == set(sass) and len(figures) == 28
    for name, found in figures.items():
        assert (found["stack"], found["stores"], found["loads"]) == (0, 0, 0), (name, found)
    assert figures["gemv_plain"]["registers"] <= 128  # two blocks on a multiprocessor
    assert max(found["registers"] for name, found in figures.items() if "copy_" in name and name != "multiply_copy") <= 64  # four
    expected = [EXPECTED] + [EXPECTED_SM_90] * (arch != "sm_80") + [EXPECTED_WGMMA] * (arch == "sm_90a")
    for name, instructions in (item for table in expected for item in table.items()):
        for pattern, least in instructions.items():
            assert len(re.findall(rf"\b{pattern}\b", sass[name])) >= least, (name, pattern)


@pytest.mark.parametrize("loads", [4, 8])
def test_reads_keep_their_loads_in_flight(compiled, loads):
    """Between two loads into the same registers lie all the others: nothing waits for a load that was just made."""
    _, sass, _ = compiled("sm_90a")
    loop = re.findall(r"LDG\.E\.128 (R\d+)", sass[f"read_plain_{loads}"])
    assert len(set(loop)) == loads and sorted(loop[:loads]) == sorted(loop[loads:])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """M0-M5 over twins, each once: (what came of it, the twin device, where the results are)."""

    @functools.cache
    def measure(name):
        twin, results = micro_kit.TwinDevice(), tmp_path_factory.mktemp(name)
        sizes = replace(micro_kit.SMALL, copy_bytes=1 << 20) if name == "m0" else micro_kit.SMALL
        return run(name, twin, sizes, results, begin()), twin, results

    return measure


@pytest.mark.parametrize("name", kit.fast_first(["m0", "m1", "m2", "m3", "m4", "m5"]))
def test_the_host_side(measured, name, tmp_path):
    right, _, results = measured(name)
    assert right
    (suite,) = plot.load_results(results)
    assert suite["suite"] == f"micro_{name}" and suite["setting"]["complete"]
    names = [case["name"] for case in suite["cases"]]
    assert len(names) == len(set(names)) >= 6
    plot.render_results(results, tmp_path)
    assert f"## micro_{name}" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_every_launch_hands_over_what_the_kernel_takes(compiled, measured):
    """Kernels, argument sizes, threads and shared memory as the host side has them, against the cubins."""
    figures, _, place = compiled("sm_90a")
    sizes, launched = {}, {}
    for name in KERNEL_FILES:
        elf = subprocess.run([find_tool("cuobjdump"), "-elf", place / f"{name}.cubin"], check=True, capture_output=True, text=True).stdout
        for part in elf.split(".nv.info.")[1:]:
            found = re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: 0x\w+\s+Size\s+: (0x\w+)", part)
            if found:
                sizes[re.match(r"\w+", part)[0]] = [size for _, size in sorted((int(n, 16), int(size, 16)) for n, size in found)]
    for name in ("m0", "m1", "m2", "m3", "m4", "m5"):
        twin = measured(name)[1]
        launched.update(twin.driver.sizes)
        for kernel, grid, block, shared, _ in twin.driver.launches:
            limit = {"gemv_bulk": 288, "nothing": 32, "products_bf16": 128, "products_fp16": 128}.get(kernel, 256)
            assert block == limit and grid > 0 and 0 <= shared <= 232448 - 4096, kernel
    assert set(launched) == set(figures)  # none is left out
    assert {kernel: found for kernel, found in launched.items() if found} == sizes


STRUCTS = {"copy": [m1_tiles.TiledCopy], "multiply": [m2_multiply.MultiplyCopy], "gemv": [m4_gemv.Gemv, m5_handover.Shrink]}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_kernels_fields(name, tmp_path):
    nvcc = find_tool("nvcc") or pytest.skip("nvcc is not installed")
    checks = []
    for struct in STRUCTS[name]:
        checks.append(f"sizeof(micro::{struct.__name__}) == {ctypes.sizeof(struct)}")
        for field, kind in struct._fields_:
            place = f"micro::{struct.__name__}, {field}"
            checks.append(f"offsetof({place}) == {getattr(struct, field).offset}")
            checks.append(f"sizeof(micro::{struct.__name__}::{field}) == {ctypes.sizeof(kind)}")
    source = tmp_path / "checks.cu"
    source.write_text(f'#include <cstddef>\n#include "{name}.cu"\n' + "".join(f'static_assert({check}, "");\n' for check in checks))
    flags = ["-std=c++17", "-arch=sm_90a", "-ptx", f"-I{ROOT / 'cuda/include'}", f"-I{ROOT / 'perf/micro'}", "-o", "/dev/null"]
    done = subprocess.run([nvcc, *flags, str(source)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def spoil(twin, kernel):
    """Let a twin do its work and then damage the last element of what it wrote."""
    right = twin.driver.twins[kernel]

    def wrong(grid, *arguments):
        right(grid, *arguments)
        (p, *_) = arguments
        if kernel == "gemv_plain":
            micro_kit.memory(p.y, p.rows, torch.bfloat16)[-1] *= 1.01
        elif kernel == "shrink":
            micro_kit.memory(p.z, grid, torch.float32)[-1] += 1
        elif kernel == "mma_peak":
            micro_kit.memory(arguments[1], grid * 256, torch.float32)[-1] = float("nan")
        elif kernel == "products_bf16":
            micro_kit.memory(arguments[3], grid * 512, torch.float32)[-1] *= 1 + 1e-4
        elif kernel in ("copy", "read"):
            micro_kit.memory(arguments[1], grid * 256, torch.int32)[-1] += 1
        else:
            micro_kit.memory(p.target, p.rows, torch.bfloat16)[-1] = 77

    twin.driver.twins[kernel] = wrong


@pytest.mark.parametrize(
    ("name", "kernel"),
    kit.fast_first(
        [("m0", "copy"), ("m0", "read"), ("m1", "tiled_copy"), ("m2", "multiply_copy"), ("m2", "mma_peak"), ("m3", "products_bf16"),
         ("m4", "gemv_plain"), ("m5", "gemv_plain"), ("m5", "shrink")]
    ),
)  # fmt: skip
def test_a_wrong_kernel_is_told(name, kernel, tmp_path, capsys):
    twin = micro_kit.TwinDevice()
    spoil(twin, kernel)
    assert not run(name, twin, micro_kit.SMALL, tmp_path, begin())
    assert "WrongResultError" in capsys.readouterr().err
    assert not any(json.loads(path.read_text())["setting"]["complete"] for path in tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_the_backbone_and_the_libraries_on_the_cpu(tmp_path):
    assert run("m6", micro_kit.TwinDevice(), micro_kit.SMALL, tmp_path, begin())
    (suite,) = plot.load_results(tmp_path)
    names = ["decode_packed", "decode_unpacked", "addmm", "copy", "peft_float32", "peft_bfloat16"]
    assert [case["name"] for case in suite["cases"]] == names


def test_the_twin_of_the_tensor_core(tmp_path, lib):
    """Many at once give the bits that the simulator gives one at a time."""
    a, b, c = m3_products.operands(1, "bf16", "cancelling")
    twin = m3_products.load_twin(tmp_path)
    for depth, extra in ((16, 2), (8, 1)):
        found = m3_products.by_twin(twin, a, b, c, depth, extra)
        for row, col in ((0, 0), (63, 7), (5, 3)):
            value = float(c[0, row, col])
            for k in range(0, 16, depth):
                pair = [np.ascontiguousarray(x[0, i, k : k + depth].float().numpy()) for x, i in ((a, row), (b, col))]
                value = lib.fm_sim_dot(value, *(x.ctypes.data for x in pair), depth, extra)
            assert found[0, row, col] == value


def test_exactly_so_many_blocks_fit():
    twin = micro_kit.TwinDevice()
    for blocks in (1, 2, 4):
        each = twin.shared_for(blocks) + 1024
        assert blocks * each <= twin.shared_bytes_per_multiprocessor < (blocks + 1) * each


def test_the_drivers_structs():
    """ctypes' against cuda.h's."""
    nvcc = find_tool("nvcc") or pytest.skip("nvcc is not installed")
    config, attribute = driver.LaunchConfig, driver.LaunchAttribute
    checks = [
        f"sizeof(CUlaunchConfig) == {ctypes.sizeof(config)}", f"offsetof(CUlaunchConfig, hStream) == {config.stream.offset}",
        f"offsetof(CUlaunchConfig, attrs) == {config.attributes.offset}",
        f"offsetof(CUlaunchConfig, numAttrs) == {config.num_attributes.offset}",
        f"sizeof(CUlaunchAttribute) == {ctypes.sizeof(attribute)}", f"offsetof(CUlaunchAttribute, value) == {attribute.value.offset}",
        f"CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == {driver.PROGRAMMATIC_STREAM_SERIALIZATION}",
        f"CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == {driver.MAX_DYNAMIC_SHARED_BYTES}",
        f"CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE == {driver.ATTRIBUTES['l2_bytes']}",
        f"CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT == {driver.ATTRIBUTES['num_multiprocessors']}",
        f"CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN == {driver.ATTRIBUTES['shared_bytes_per_block']}",
        f"CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR == {driver.ATTRIBUTES['shared_bytes_per_multiprocessor']}",
    ]  # fmt: skip
    text = "#include <cstddef>\n#include <cuda.h>\n" + "".join(f'static_assert({check}, "{check}");\n' for check in checks)
    done = subprocess.run([nvcc, "-x", "cu", "-E", "-"], input="#include <cuda.h>\n", check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("cuda.h is not installed")
    command = [nvcc, "-std=c++17", "-x", "c++", "-c", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class StubLibrary:
    """libcuda's place: keeps what a launch was given."""

    def __init__(self, sizes):
        self.sizes, self.launched = sizes, []

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        c = config._obj
        edge = (c.attributes[0].id, c.attributes[0].value) if c.num_attributes else None
        second = ctypes.cast(pointers[1], ctypes.POINTER(ctypes.c_int))[0]
        self.launched.append((list(c.grid), list(c.block), c.shared_bytes, c.stream, edge, second))
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = b"invalid argument"
        return 0

    def cuModuleLoadData(self, module, image):
        return 1


def test_the_drivers_launch(tmp_path):
    found = driver.Driver.__new__(driver.Driver)
    found._library, found._sizes = StubLibrary([8, 4]), {}
    arguments = [ctypes.c_void_p(64), ctypes.c_int(7)]
    for programmatic in (False, True):
        found.launch(5, 33, 256, 1024, 99, arguments, programmatic)
    plain, edge = found._library.launched
    assert plain == ([33, 1, 1], [256, 1, 1], 1024, 99, None, 7)
    assert edge == ([33, 1, 1], [256, 1, 1], 1024, 99, (6, 1), 7)
    with pytest.raises(driver.DriverError, match=r"arguments of \[8\] bytes, expected \[8, 4\]"):
        found.launch(5, 33, 256, 0, 0, arguments[:1], False)
    (tmp_path / "cubin").write_bytes(b"nonsense")
    with pytest.raises(driver.DriverError, match=r"cuModuleLoadData: invalid argument \(1\)"):
        found.load(tmp_path / "cubin")


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","tiled_copy_128","Command line profiler metrics","dram__bytes_read.sum","byte","1,073,741,824"
"0","1","tiled_copy_128","Command line profiler metrics","lts__t_bytes.sum","byte","2147483648"
"1","1","tiled_copy_256","Command line profiler metrics","dram__bytes_read.sum","byte","7"
"""


def test_the_profilers_table():
    assert m1_tiles.read_profile(NCU) == [
        {"kernel": "tiled_copy_128", "dram__bytes_read.sum": 2.0**30, "lts__t_bytes.sum": 2.0**31},
        {"kernel": "tiled_copy_256", "dram__bytes_read.sum": 7.0},
    ]
    assert m1_tiles.read_profile("no kernels were profiled") == []


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["m0", "--results", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["m7"])
    assert set(BENCHMARKS) == {f"m{i}" for i in range(7)}


def test_a_kernel_that_does_not_compile_says_why(monkeypatch, tmp_path):
    find_tool("nvcc") or pytest.skip("nvcc is not installed")
    (tmp_path / "broken.cu").write_text("void nonsense(\n")
    (tmp_path / "ptx.cuh").write_text("")
    monkeypatch.setattr(device, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="error"):
        device.compile_kernels("broken", "sm_90a", tmp_path / "build")
