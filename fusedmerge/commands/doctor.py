"""`fusedmerge doctor`: what is installed, what can run here, and why not.

Every probe stands alone: one that raises, whatever it raises, is reported as a line and stops none of the others.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["diagnose", "render"]

PACKAGES = ("numpy", "torch", "cupy", "transformers", "peft", "safetensors", "tqdm", "matplotlib")
VARIABLES = (
    "FUSEDMERGE_BACKEND", "FUSEDMERGE_SIM_LIB", "FUSEDMERGE_CACHE_DIR", "FUSEDMERGE_CUDA_ARCH_LIST", "FUSEDMERGE_LOGLEVEL",
    "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE",
)  # fmt: skip


def diagnose() -> dict[str, Any]:
    """Everything `doctor` tells, as plain data. Never raises an `Exception`."""
    import fusedmerge

    return {
        "fusedmerge": {"version": fusedmerge.__version__, "path": str(Path(fusedmerge.__file__).parent)},
        "python": {"version": platform.python_version(), "path": sys.executable, "platform": platform.platform()},
        "packages": {name: _package(name) for name in PACKAGES},
        "extension": _probe(_extension),
        "gpu": _probe(_gpus),
        "compiler": _probe(_compiler),
        "cpu": {"cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
        "backends": _probe(_backends),
        "cache": _probe(_cache),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _probe(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return {"error": _describe(error)}


def _package(name: str) -> dict[str, Any]:
    """The version that imports, or what the import raised beside the version that pip says is installed."""

    def load() -> dict[str, Any]:
        module = importlib.import_module(name)
        return {"version": str(getattr(module, "__version__", None) or importlib.metadata.version(name))}

    found = _probe(load)
    if "error" in found:
        try:
            found["installed"] = importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            if importlib.util.find_spec(name) is None:
                return {"missing": True}
    return found


def _extension() -> dict[str, Any]:
    """The compiled extension `fusedmerge._ext`."""
    if importlib.util.find_spec("fusedmerge._ext") is None:
        return {"missing": True}
    module = importlib.import_module("fusedmerge._ext")
    return {"path": str(module.__file__)}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} exited with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _gpus() -> dict[str, Any]:
    """GPUs and driver by nvidia-smi, or else by torch."""
    if shutil.which("nvidia-smi"):
        fields = ("name", "driver_version", "memory.total", "compute_cap")
        out = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        return {"gpus": [dict(zip(fields, (cell.strip() for cell in line.split(",")), strict=True)) for line in out.splitlines() if line]}
    try:
        import torch

        if torch.cuda.is_available():
            return {"gpus": [{"name": torch.cuda.get_device_name(index)} for index in range(torch.cuda.device_count())]}
    except Exception as error:
        return {"gpus": [], "error": f"no nvidia-smi, and torch cannot tell: {_describe(error)}"}
    return {"gpus": []}


def _compiler() -> dict[str, Any]:
    """nvcc: on the PATH, under CUDA_HOME, or where CUDA installs it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [shutil.which("nvcc"), *(str(Path(home) / "bin" / "nvcc") for home in [*homes, "/usr/local/cuda"])]
    for place in places:
        if place and os.access(place, os.X_OK):
            lines = [line for line in _run(place, "--version").splitlines() if "release" in line]
            return {"nvcc": place, "version": lines[0].split("release", 1)[1].strip(" ,") if lines else "unknown"}
    return {"missing": True}


def _backends() -> dict[str, Any]:
    from fusedmerge.backend import backends

    return {name: {"usable": bool(status), "reason": status.reason} for name, status in backends().items()}


def _cache() -> dict[str, Any]:
    """The directory of compiled kernels: FUSEDMERGE_CACHE_DIR, or the user's cache."""
    from fusedmerge.backend.compiler import cache_directory

    path = cache_directory()
    parent = next((p for p in [path, *path.parents] if p.exists()), path)
    return {"path": str(path), "exists": path.is_dir(), "writable": os.access(parent, os.W_OK) and parent.is_dir()}


def render(found: dict[str, Any]) -> str:
    """`diagnose()` as text."""
    rows = [
        ("fusedmerge", f"{found['fusedmerge']['version']}  ({found['fusedmerge']['path']})"),
        ("python", f"{found['python']['version']}  ({found['python']['path']}; {found['python']['platform']})"),
        *((name, _package_line(entry)) for name, entry in found["packages"].items()),
        ("extension", _package_line(found["extension"])),
        ("cpu", f"{found['cpu']['usable']} of {found['cpu']['cores']} cores usable"),
        *(("gpu", line) for line in _gpu_lines(found["gpu"])),
        ("compiler", _compiler_line(found["compiler"])),
        *_backend_lines(found["backends"]),
        ("cache", _cache_line(found["cache"])),
        *((name, value) for name, value in found["environment"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in rows)


def _package_line(entry: dict[str, Any]) -> str:
    if entry.get("missing"):
        return "not installed"
    if "error" in entry:
        version = f" (version {entry['installed']})" if "installed" in entry else ""
        return f"BROKEN{version}: the import raised {entry['error']}"
    return str(entry.get("version") or entry.get("path"))


def _gpu_lines(found: dict[str, Any]) -> list[str]:
    lines = [", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in gpu.items()) for gpu in found.get("gpus", [])]
    if "error" in found:
        lines.append(f"unknown ({found['error']})")
    return lines or ["none found"]


def _compiler_line(found: dict[str, Any]) -> str:
    if found.get("missing"):
        return "no nvcc"
    return f"nvcc failed: {found['error']}" if "error" in found else f"nvcc {found['version']}  ({found['nvcc']})"


def _backend_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in found:
        return [("backends", f"unknown ({found['error']})")]
    return [(f"backend {name}", ("usable: " if entry["usable"] else "unusable: ") + entry["reason"]) for name, entry in found.items()]


def _cache_line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"unknown ({found['error']})"
    state = "exists" if found["exists"] else "not made yet"
    return f"{found['path']}  ({state}{'' if found['writable'] else ', NOT WRITABLE'})"
