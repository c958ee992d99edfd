"""Fixtures that several test files use."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusedmerge import backend

BUILD = Path(__file__).parent / "sim/build.py"


@pytest.fixture(scope="session")
def sim_library():
    """The simulator's path; FUSEDMERGE_SIM_LIB names another build of it. build.py holds a lock: of several workers, one compiles."""
    given = os.environ.get("FUSEDMERGE_SIM_LIB")
    return given or subprocess.run([sys.executable, str(BUILD)], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def lib(sim_library):
    """The simulator, as tests/sim/harness.py drives it."""
    sys.path.insert(0, str(BUILD.parent))
    import harness

    return harness.load(Path(sim_library))


@pytest.fixture
def rng(request):
    return np.random.default_rng(sum(map(ord, request.node.name)))


@pytest.fixture(params=["native", "torch", "sim"])
def engine(request, monkeypatch):
    """Every way to run a switch on the CPU."""
    monkeypatch.delenv("FUSEDMERGE_BACKEND", raising=False)
    if request.param == "torch":
        monkeypatch.setattr(backend, "extension", lambda: None)
    elif request.param == "sim":
        monkeypatch.setenv("FUSEDMERGE_SIM_LIB", request.getfixturevalue("sim_library"))
        monkeypatch.setenv("FUSEDMERGE_BACKEND", "sim")
    else:
        assert backend.extension(), "the extension is not built: run `make test`"
    return request.param
