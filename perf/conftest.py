"""Fixtures of the suites. Each module's records become perf/results/<device>/<suite>.json, written anew after every test that passed.

Timings never decide whether a test passes; wrong results do, and a suite with a failure leaves no file of its run.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
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
    parser.addoption("--budget", type=float, default=float("inf"), help="seconds after which no further benchmark is started")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()


_STARTED = pytest.StashKey[float]()
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest, began: dict[str, Any], ceilings: Ceilings) -> Iterator[Suite]:
    found = Suite(request.module.__name__.rpartition(".")[2].removeprefix("test_"))
    found.setting["ceilings"] = dataclasses.asdict(ceilings)
    yield found
    _print(found)


@pytest.fixture(scope="session")
def began() -> dict[str, Any]:
    return begin()


@pytest.fixture(autouse=True)
def _evidence(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write the suite's file after a test that passed; take it back after one that failed."""
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
    elif found.cases and not found.failed:
        found.path = write(found, Path(config.getoption("--results")), request.getfixturevalue("began"))


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """What --rounds says; 0: as many as fit."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """The device's measured ceilings."""
    return measure(device())


def _print(suite: Suite) -> None:
    """Measured and predicted times of a suite."""
    rows = [
        (case["group"], case["title"], f"{case['median_ms']:.4g}", f"{case['predicted_ms']:.4g}", f"{case['median_ms'] / case['predicted_ms']:.2f}")
        for case in suite.cases
        if case.get("predicted_ms")
    ]
    print(f"\n{suite.path or f'{suite.name}: not written'}")
    if rows:
        print(text_table(["group", "case", "ms", "predicted ms", "measured / predicted"], rows))
