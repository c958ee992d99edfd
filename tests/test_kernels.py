"""Launching kernels by name, as far as no GPU is needed: what the extension, the simulator and the just-in-time compiler know them by."""

import ctypes
import re

import pytest

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


def test_a_kernel_s_source_is_one_call():
    source = compiler.Kernel("lora_linear.cuh", "LinearParams", "run_gemv<Bf16, 1>", threads=128, blocks=2).source()
    assert re.search(r"FM_KERNEL_OF\(128, 2\) fusedmerge_kernel\(const FM_GRID_CONSTANT LinearParams params\)", source)
    assert source.endswith("{ run_gemv<Bf16, 1>(params); }\n") and '#include "fusedmerge/kernel/lora_linear.cuh"' in source
