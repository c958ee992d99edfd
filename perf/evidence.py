"""Results files: what was measured, on what, by which commit (docs/performance.md has the schema)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Suite", "begin", "device_name", "head", "write", "write_content"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "numpy": "numpy", "triton": "triton"}


class Suite:
    """One suite's cases, in the order they were recorded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.setting: dict[str, Any] = {}
        self.cases: list[dict[str, Any]] = []
        self.path: Path | None = None  # once written
        self.failed = False  # a test of it has failed: what is written is no evidence any more

    def record(self, name: str, group: str, title: str, seconds: list[float], **more: Any) -> dict[str, Any]:
        """Add a case: raw samples in seconds, and whatever else the schema has (bytes, flops, predicted_ms, error, ratio, x, ...)."""
        samples = [round(1e3 * s, 6) for s in seconds]
        case = {"name": name, "group": group, "title": title, "median_ms": statistics.median(samples), **more, "samples_ms": samples}
        self.cases.append(case)
        return case

    def record_drift(self, name: str, group: str, title: str, drift: list[list[float]], delta: float) -> None:
        """Add a case without times: [[switches, |W - W0| / |W0|], ...] beside the mixture's own |delta| / |W|."""
        self.cases.append({"name": name, "group": group, "title": title, "drift": drift, "delta": delta})


def begin() -> dict[str, Any]:
    """The commit and the machine's load, taken at the start: whoever commits meanwhile does not change what is measured.

    Where the files came without their repository, FUSEDMERGE_COMMIT says which commit they are of.
    """
    changed = _run("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": _run("git", "rev-parse", "HEAD") or os.environ.get("FUSEDMERGE_COMMIT"),
        "git_dirty": None if changed is None else bool(changed),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
    }


def device_name() -> str:
    """The results' directory: nvidia-h200, cpu-2core."""
    import torch

    if not torch.cuda.is_available():
        return f"cpu-{len(os.sched_getaffinity(0))}core"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def head(name: str, began: dict[str, Any]) -> dict[str, Any]:
    """What every results file begins with."""
    import torch

    from fusedmerge.backend import backends

    gpu = torch.cuda.is_available()
    return {
        "schema": 1,
        "suite": name,
        "device": device_name(),
        "processor": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if gpu else None,
        "gpu": _gpu() if gpu else None,
        "versions": _versions(gpu),
        **began,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": {name: status.reason for name, status in backends().items() if status},
        "threads": torch.get_num_threads(),
    }


def write(suite: Suite, results: Path, began: dict[str, Any], suffix: str = ".json") -> Path:
    """Write <results>/<device>/<suite>.json, whole or not at all."""
    content = {**head(suite.name, began), "setting": suite.setting, "cases": suite.cases}
    return write_content(content, results, suffix)


def write_content(content: dict[str, Any], results: Path, suffix: str = ".json") -> Path:
    """The same for a file that is no list of cases; content: `head`'s fields and more."""
    path = results / str(content["device"]) / f"{content['suite']}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    return path


def _versions(gpu: bool) -> dict[str, str]:
    import torch

    import fusedmerge

    found = {"fusedmerge": fusedmerge.__version__, "python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    if gpu:
        found["cuda"] = str(torch.version.cuda)
        try:
            import cupy

            found["cupy"] = cupy.__version__
        except ImportError:
            pass
    return found


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "clocks": _run("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader", "--id=0"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
