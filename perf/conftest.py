"""Benchmarks record what they measured; each module's records become perf/results/<device>/<suite>.json when the session ends.

Timings never decide whether a test passes; wrong results do, and a suite with a failure writes nothing.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `import models`
sys.path.insert(1, str(HERE.parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=str(HERE / "results"), help="where <device>/<suite>.json is written")
    parser.addoption("--rounds", type=int, default=20, help="rounds of each side-by-side measurement")


class Suite:
    """One module's cases, in the order they were recorded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.setting: dict[str, Any] = {}
        self.cases: list[dict[str, Any]] = []

    def record(self, name: str, group: str, title: str, seconds: list[float], **more: Any) -> dict[str, Any]:
        """Add a case: raw samples in seconds, and whatever else the schema has (bytes, fraction_of_copy, error, ratio, compared_to)."""
        samples = [round(1e3 * s, 6) for s in seconds]
        case = {"name": name, "group": group, "title": title, "median_ms": statistics.median(samples), **more, "samples_ms": samples}
        self.cases.append(case)
        return case


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    found = Suite(request.module.__name__.rpartition(".")[2].removeprefix("test_"))
    failed = request.session.testsfailed
    began = {  # at the start: whoever commits meanwhile does not change what is measured
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
    }
    yield found
    if found.cases and request.session.testsfailed == failed:
        write(found, Path(request.config.getoption("--results")), began)


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))


def write(suite: Suite, results: Path, began: dict[str, Any]) -> Path:
    """Write a suite's file (see DESIGN, Evidence)."""
    import torch

    from fusedmerge.backend import backends

    device = f"cpu-{len(os.sched_getaffinity(0))}core"
    names = ("torch", "transformers", "peft", "numpy")
    content = {
        "schema": 1,
        "suite": suite.name,
        "device": device,
        "processor": _processor(),
        "driver": None,
        "versions": {"fusedmerge": _own_version(), "python": platform.python_version(), **{name: version(name) for name in names}},
        **began,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": backends()["cpu"].reason,
        "threads": torch.get_num_threads(),
        "setting": suite.setting,
        "cases": suite.cases,
    }
    path = results / device / f"{suite.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwrote {path}")
    return path


def _own_version() -> str:
    import fusedmerge

    return fusedmerge.__version__


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
