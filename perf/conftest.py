"""Fixtures of the suites. Each module's records become perf/results/<device>/<suite>.json, written anew after every test that passed.

Timings never decide whether a test passes; wrong results do, and what a suite with a failure has measured goes to <suite>.failed instead.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))  # for `from perf import ...`

from fusedmerge.commands.tables import text_table  # noqa: E402
from perf.ceilings import measure  # noqa: E402
from perf.evidence import Suite, begin, write  # noqa: E402
from perf.model import Ceilings  # noqa: E402
from perf.timing import device  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=str(HERE / "results"), help="where <device>/<suite>.json is written")
    parser.addoption("--rounds", type=int, default=0, help="rounds of each measurement (default: as many as fit into a few seconds)")
    parser.addoption("--sharegpt", help="a ShareGPT JSON, for its prompts' lengths (default: drawn from a distribution like it)")
    parser.addoption("--new-tokens", type=int, default=0, help="decoded for each query (default: 8 on a CPU, 32 on a GPU; the paper: 200)")
    parser.addoption("--budget", type=float, default=float("inf"), help="seconds after which no further benchmark is started")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """perf/ablations.py is a suite, too."""
    if file_path.name != "ablations.py" or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()
    config.stash[_SUITES] = []


_STARTED = pytest.StashKey[float]()
_FAILED = pytest.StashKey[bool]()
_SUITES = pytest.StashKey[list[Suite]]()


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    """What a benchmark held is gone before the next one begins."""
    import torch

    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, ceilings: Ceilings) -> Iterator[Suite]:
    """The records of the test's module."""
    found = Suite(request.module.__name__.rpartition(".")[2].removeprefix("test_"))
    found.setting["ceilings"] = dataclasses.asdict(ceilings)
    request.config.stash[_SUITES].append(found)
    yield found


@pytest.fixture(scope="session")
def began() -> dict[str, Any]:
    """Commit and load at the session's start."""
    return begin()


@pytest.fixture(autouse=True)
def _evidence(request: pytest.FixtureRequest, began: dict[str, Any]) -> Iterator[None]:
    """Write the suite's file after each test; once one has failed, under the other name."""
    config = request.config
    if time.monotonic() - config.stash[_STARTED] > config.getoption("--budget"):
        pytest.skip("the time budget is used up")
    yield
    if "suite" not in request.fixturenames:
        return
    found = request.getfixturevalue("suite")
    found.failed |= request.node.stash.get(_FAILED, False)
    if found.failed and found.path:
        found.path.unlink(missing_ok=True)
    if found.cases:
        found.path = write(found, Path(config.getoption("--results")), began, ".failed" if found.failed else ".json")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """What --rounds says; 0: as many as fit."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """The device's measured ceilings."""
    return measure(device())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Measured and predicted times, and where they were written."""
    for suite in config.stash[_SUITES]:
        rows = [
            (
                case["title"],
                *(f"{case[name]:.4g}" for name in ("median_ms", "predicted_ms")),
                f"{case['median_ms'] / case['predicted_ms']:.2f}",
            )
            for case in suite.cases
            if case.get("predicted_ms")
        ]
        written = str(suite.path or "nothing was measured") + " (a test has failed)" * suite.failed
        terminalreporter.write_line(f"\n{suite.name}: {written}")
        if rows:
            terminalreporter.write_line(text_table(["case", "ms", "predicted ms", "measured / predicted"], rows))
