"""Launching kernels by name, as far as no GPU is needed: what the extension, the simulator and the just-in-time compiler know them by."""

import contextlib
import ctypes
import re
from types import SimpleNamespace

import pytest
import torch

from fusedmerge.backend import compiler, cuda, kernels
from fusedmerge.backend.linear_params import LinearParams, RouteParams
from fusedmerge.errors import BackendError


@pytest.fixture
def simulator(sim_library, monkeypatch):
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", sim_library)
    return kernels.SimLauncher()


def test_names_and_params_are_checked_before_a_launch(simulator):
    route = compiler.Kernel("route.cuh", "RouteParams", "run_route<Bf16>", "route_bf16")
    with pytest.raises(BackendError, match=r"route_bf17: simulator: expected a launch without faults, got no such kernel: route_bf17"):
        simulator.launch(compiler.Kernel("route.cuh", "RouteParams", "run_route<Bf16>", "route_bf17"), RouteParams(), 1, 0)
    with pytest.raises(BackendError, match="params of another size: route_bf16"):
        simulator.launch(route, LinearParams(), 1, 0)


def test_the_extension_refuses_an_unknown_name_or_says_that_it_has_no_kernels():
    extension, params = cuda.load_extension(), RouteParams()
    expected = r'kernel: expected one of the library\'s, got "nothing"' if extension.has_cuda() else "one that was built without nvcc"
    with pytest.raises(RuntimeError, match=f"nothing: .*{expected}"):
        extension.prepare_kernel("nothing")
    with pytest.raises(RuntimeError, match=f"nothing: .*{expected}"):
        extension.launch_kernel("nothing", 1, 0, False, ctypes.addressof(params), ctypes.sizeof(params), 0)


class Driver:
    """What the extension, or CuPy, would be asked and told; `version` of the code's PTX."""

    def __init__(self, version):
        self.version, self.asked, self.edges = version, [], []

    def query_device(self, ordinal):
        return 4, 100_000

    def prepare_kernel(self, name):
        self.asked.append(name)
        return self.version >= 90

    def launch_kernel(self, name, grid, shared_bytes, programmatic, *_):
        self.edges.append(programmatic)

    def has_cuda(self):
        return True

    def launch_function(self, name, function, grid, threads, shared_bytes, programmatic, *_):
        self.edges.append(programmatic)

    def load(self, path):
        driver = self

        class Function:
            kernel = SimpleNamespace(ptr=1)

            @property
            def ptx_version(self):
                driver.asked.append(path)
                return driver.version

            def __call__(self, *_, shared_mem, stream):
                assert stream.ptr == 0
                driver.edges.append(False)

        return SimpleNamespace(get_function=lambda name: Function())


@pytest.fixture
def no_gpu(monkeypatch):
    """torch's device and stream, and CuPy's, as far as a launcher needs them."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(torch.cuda, "device", lambda ordinal: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    attributes = {"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 100_000}
    monkeypatch.setattr(cupy.cuda, "Device", lambda ordinal: SimpleNamespace(compute_capability="90", attributes=attributes))
    monkeypatch.setattr(kernels, "compiled", lambda kernel, capability: kernel.name)
    return cupy


@pytest.mark.parametrize("kind", [kernels.AotLauncher, kernels.JitLauncher])
@pytest.mark.parametrize("version", [80, 90, 120])
def test_whether_a_kernel_takes_a_programmatic_edge_is_asked_once(no_gpu, monkeypatch, kind, version):
    driver = Driver(version)
    monkeypatch.setattr(kernels, "load_extension", lambda: driver)
    monkeypatch.setattr(no_gpu, "RawModule", driver.load)
    launcher = kind(0)
    one, other = (compiler.Kernel("route.cuh", "RouteParams", "run_route<Bf16>", name) for name in ("one", "other"))
    for kernel, programmatic in ((one, True), (one, False), (other, True), (one, True)):
        launcher.launch(kernel, RouteParams(), 1, 0, programmatic)
    assert driver.asked == ["one", "other"]
    assert driver.edges == ([True, False, True, True] if version >= 90 else [False] * 4)


def test_a_kernel_s_source_is_one_call():
    source = compiler.Kernel("lora_linear.cuh", "LinearParams", "run_gemv<Bf16, 1>", threads=128, blocks=2).source()
    assert re.search(r"FM_KERNEL_OF\(128, 2\) fusedmerge_kernel\(const FM_GRID_CONSTANT LinearParams params\)", source)
    assert source.endswith("{ run_gemv<Bf16, 1>(params); }\n") and '#include "fusedmerge/kernel/lora_linear.cuh"' in source
