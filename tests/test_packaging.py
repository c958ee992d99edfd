"""What an installation promises: a light import, one version, the files in the wheel, and pins that agree with the metadata."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmerge
from fusedmerge.backend import compiler

ROOT = Path(__file__).resolve().parents[1]


def metadata() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("fusedmerge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fusedmerge is not installed here")


def test_import_is_light() -> None:
    """In a fresh process `import fusedmerge` loads neither torch nor CuPy nor the extension, and prints what it took."""
    code = (
        "import json, sys, time; start = time.perf_counter(); import fusedmerge; seconds = time.perf_counter() - start;"
        "print(json.dumps([seconds, sorted(sys.modules)]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, modules = json.loads(output)
    print(f"import fusedmerge: {seconds * 1e3:.0f} ms")
    assert not {"torch", "cupy", "transformers", "peft", "fusedmerge._ext"} & set(modules)


def test_version_is_the_metadata_version() -> None:
    assert metadata().version == fusedmerge.__version__


def test_installation_has_the_extension() -> None:
    metadata()
    assert importlib.util.find_spec("fusedmerge._ext") is not None
    assert "merge_cpu" in dir(importlib.import_module("fusedmerge._ext"))


def test_the_extension_and_the_kernels_headers_are_there_and_small() -> None:
    """With the kernels of four architectures in it, the extension leaves room in a wheel of 20 MB."""
    metadata()
    assert Path(importlib.import_module("fusedmerge._ext").__file__).stat().st_size < 20e6
    assert (compiler.header_root() / "fusedmerge/kernel/switch.cuh").is_file()


def test_installation_is_typed() -> None:
    assert (Path(fusedmerge.__file__).parent / "py.typed").is_file()


def test_console_script() -> None:
    scripts = {entry.name: entry.value for entry in metadata().entry_points if entry.group == "console_scripts"}
    assert scripts == {"fusedmerge": "fusedmerge.cli:main"}


def test_constraints_pin_torch_and_the_tools_alike() -> None:
    """A tool pinned twice is pinned to one version; the torch that tests use is one that users may have."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert "torch" in pins
    for requirement in metadata().requires or []:
        name, _, version = re.match(r"([\w-]+)(==)?([\w.]+)?", requirement).groups()
        if version and name in pins:
            assert pins[name] == version, requirement


@pytest.mark.slow
def test_the_log_level_is_taken_from_the_environment():
    script = "import torch, fusedmerge as fm; fm.AdapterBank.random({'w': torch.zeros(4, 4).bfloat16() + 1}, 1, 2)"
    for level, heard in (("INFO", True), ("error", False), ("", False)):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "FUSEDMERGE_LOGLEVEL": level}, check=True, capture_output=True, text=True
        )
        assert ("narrowing its factors" in done.stderr) == heard


def test_the_stub_names_what_the_extension_has():
    metadata()
    stub = set(re.findall(r"^def (\w+)", (ROOT / "fusedmerge/_ext.pyi").read_text(), re.MULTILINE))
    assert stub == {name for name in dir(importlib.import_module("fusedmerge._ext")) if not name.startswith("_")}
