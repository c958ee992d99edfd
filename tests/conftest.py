"""Fixtures that several test files use."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedmerge import backend
from perf import cubin

BUILD = Path(__file__).parent / "sim/build.py"
sys.path.insert(0, str(BUILD.parent))  # the simulator's own modules

# What runs kernels without a GPU, as backend "sim": the simulator their C++, its machine for PTX what nvcc makes of that.
ON_HOST = ["sim", pytest.param("ptx", marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def sim_library():
    """The simulator's path; FUSEDMERGE_SIM_LIB names another build of it. build.py holds a lock: of several workers, one compiles."""
    given = os.environ.get("FUSEDMERGE_SIM_LIB")
    return given or subprocess.run([sys.executable, str(BUILD)], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def lib(sim_library):
    """The simulator, as tests/sim/harness.py drives it."""
    import harness

    return harness.load(Path(sim_library))


def use_host(name, request, monkeypatch):
    """`name` of ON_HOST. FUSEDMERGE_PTX_ARCH names another architecture than compute_90 for the PTX."""
    path = request.getfixturevalue("sim_library")
    monkeypatch.setenv("FUSEDMERGE_SIM_LIB", path)
    if name == "ptx":
        library = ctypes.CDLL(path)
        library.fm_sim_use_ptx(request.getfixturevalue("kernels_ptx"), 0)
        request.addfinalizer(lambda: library.fm_sim_use_ptx(None, 0))


@pytest.fixture(params=ON_HOST)
def on_host(request, monkeypatch):
    """The simulator, or its machine for PTX; torch.empty gives NaN and the largest ints."""
    use_host(request.param, request, monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def kernels_ptx():
    import build

    nvcc = cubin.find_tool("nvcc") or pytest.skip("nvcc is not installed")
    return build.ptx(nvcc, os.environ.get("FUSEDMERGE_PTX_ARCH", "compute_90")).read_bytes()


@pytest.fixture
def rng(request):
    return np.random.default_rng(sum(map(ord, request.node.name)))


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("jit", "aot")]


@pytest.fixture(params=["native", "torch", "sim", *ON_GPU])
def engine(request, monkeypatch):
    """Every way to run a switch. On a GPU, tensors are made there by default."""
    monkeypatch.delenv("FUSEDMERGE_BACKEND", raising=False)
    if request.param in ("jit", "aot"):
        use_gpu(request.param, request, monkeypatch)
    elif request.param == "torch":
        monkeypatch.setattr(backend, "extension", lambda: None)
    elif request.param == "sim":
        monkeypatch.setenv("FUSEDMERGE_SIM_LIB", request.getfixturevalue("sim_library"))
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    else:
        assert backend.extension(), "the extension is not built: run `make test`"
    return request.param


@pytest.fixture(params=ON_GPU)
def on_gpu(request, monkeypatch):
    """Every way to run a switch on a GPU."""
    use_gpu(request.param, request, monkeypatch)
    return request.param


def use_gpu(name, request, monkeypatch):
    status = backend.backends()[name]
    assert status, status.reason
    monkeypatch.setenv("FUSEDMERGE_BACKEND", name)
    torch.set_default_device("cuda")
    request.addfinalizer(lambda: torch.set_default_device(None))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A kernel's fault ends this process's use of the GPU: the tests after it go to another process, or are not run."""
    done = yield
    if item.get_closest_marker("gpu") and gpu_is_lost():
        if hasattr(item.config, "workerinput"):
            os._exit(1)  # xdist says which test ended its worker, and starts another one
        item.session.shouldfail = f"{item.nodeid}: a kernel's fault has ended this process's use of the GPU"
    return done


def gpu_is_lost():
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU are not there where there is none."""
    if not torch.cuda.is_available():
        gone = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)
