"""`make gpu` without a GPU: budget, order, partial results, exit codes, and what it says where something is missing."""

from __future__ import annotations

import io
import re
import sys
import time
from types import SimpleNamespace

import pytest

from perf import gpu
from perf.gpu import Step


def step(name, script, seconds=0.0, **more):
    return Step(name, ("sh", "-c", script), seconds, **more)


def run(steps, budget=20.0):
    log = io.StringIO()
    return {outcome.name: outcome.verdict for outcome in gpu.run_part(steps, budget, log)}, log.getvalue()


def test_steps_run_in_order_and_leave_their_output(capfd):
    verdicts, log = run([step("one", "echo first"), step("two", "echo second; echo to the error stream >&2")])
    assert verdicts == {"one": "passed", "two": "passed"}
    words = [log.index(word) for word in ("first", "one: passed", "second", "to the error stream", "two: passed")]
    assert words == sorted(words)
    assert "second" in capfd.readouterr().out


def test_a_failure_is_told_and_the_rest_still_runs():
    verdicts, _ = run([step("bad", "exit 3"), step("mute", "echo 7 wrong weights", expect="GPU part: .* 0 wrong"), step("good", "true")])
    assert verdicts["bad"] == "failed: exit code 3"
    assert verdicts["mute"].startswith("failed: no line like")
    assert verdicts["good"] == "passed"


def test_a_suite_that_left_something_out_has_not_passed():
    verdicts, _ = run([step("suite", "echo SKIPPED [2] the time budget is used up", refuse=gpu.CUT)])
    assert verdicts["suite"] == "not finished: SKIPPED [2] the time budget is used up"
    (suite,) = gpu.steps_of("sgmv", sys.executable, [], gpu.ROOT, True)[1:]
    assert suite.refuse == gpu.CUT


def test_a_step_that_outlasts_the_budget_is_ended_with_its_children(tmp_path):
    partial = tmp_path / "partial.json"
    start = time.monotonic()
    verdicts, _ = run([step("long", f"echo kept > {partial}; sleep 60 & sleep 60; echo never > {partial}"), step("late", "true", 5.0)], 1.0)
    assert time.monotonic() - start < 8
    assert verdicts["long"] == "ended: the budget is used up"
    assert verdicts["late"].startswith("not begun: ")
    assert partial.read_text() == "kept\n"


@pytest.mark.slow
def test_pytest_tells_what_had_failed_when_its_time_is_over(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "def test_bad():\n    assert 6 * 9 == 42\n\ndef test_long():\n    import time\n    time.sleep(60)\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "2", str(tmp_path))
    verdicts, log = run([Step("suite", command, 0.0)], 6.0)
    assert verdicts == {"suite": "ended: the budget is used up"} and "assert (6 * 9) == 42" in log


def test_one_that_ignores_the_signals_is_ended_too(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    start = time.monotonic()
    verdicts, _ = run([step("stubborn", "trap '' INT TERM; while :; do sleep 0.1; done")], 0.5)
    assert verdicts["stubborn"] == "ended: the budget is used up" and time.monotonic() - start < 8


def test_a_step_that_does_not_fit_is_left_out_and_a_shorter_one_is_not():
    verdicts, _ = run([step("big", "true", 100.0), step("small", "true", 1.0)], 10.0)
    assert verdicts["big"].startswith("not begun: 10 s are left") and verdicts["small"] == "passed"


def test_what_is_missing_is_named():
    verdicts, _ = run([Step("tool", ("no-such-sanitizer",), 0.0), step("suite", "true", needs=("perf/test_no_such.py",))])
    assert verdicts == {"tool": "is not there: no-such-sanitizer", "suite": "is not there: perf/test_no_such.py"}


def test_what_is_left_is_told_to_the_suites():
    _, log = run([step("suite", "echo budget {left}")], 30.0)
    assert "budget 25" in log


def test_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    assert gpu.main(["micro", "--log", str(tmp_path / "log")]) == 1
    assert "no NVIDIA GPU here" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 1", 1)])
def test_the_exit_code(monkeypatch, script, code, tmp_path):
    monkeypatch.setattr(gpu, "gpu", lambda: ("NVIDIA Nonesuch", "9.0"))
    seen = {}

    def steps(part, python, install, results, as_is):
        seen.update(part=part, results=results, as_is=as_is)
        return [
            step("install", "echo for $FUSEDMERGE_CUDA_ARCH_LIST, CUDA $FUSEDMERGE_CUDA, in $PATH"),
            step("m0", script),
            step("m1", "exit 9"),
        ]

    monkeypatch.setattr(gpu, "steps_of", steps)
    log = tmp_path / "here/log"
    assert gpu.main(["micro", "--only", "m0", "--as-is", "--results", str(tmp_path), "--log", str(log)]) == code
    assert seen == {"part": "micro", "results": tmp_path, "as_is": True}
    text = log.read_text()
    assert re.search(r"for 9\.0a, CUDA ON, in .*:/usr/local/cuda/bin\n", text) and "micro: m0" in text and "m1" not in text
    with pytest.raises(SystemExit):
        gpu.main(["nonsense"])


@pytest.mark.parametrize("marked", [True, False])
def test_a_kernel_s_fault_ends_the_process(monkeypatch, marked):
    """What would fail after it is not run: with xdist by another process."""
    from tests import conftest

    def run_one(**config):
        item = SimpleNamespace(get_closest_marker=lambda _: marked, nodeid="this test", session=SimpleNamespace(shouldfail=False))
        item.config = SimpleNamespace(**config)
        hook = conftest.pytest_runtest_protocol(item)
        next(hook)
        with pytest.raises(StopIteration, match="done"):
            hook.send("done")
        return item.session.shouldfail

    ended = []
    monkeypatch.setattr(conftest.os, "_exit", ended.append)
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lambda: None)
    assert not run_one() and not run_one(workerinput={}) and not ended
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("an illegal memory access")))
    assert bool(run_one()) == marked
    run_one(workerinput={})
    assert ended == [1] * marked


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_has_steps_that_fit(part, tmp_path):
    """With a minute to spare of ten, names of its own for each step, and this interpreter."""
    for as_is in (True, False):
        steps = gpu.steps_of(part, sys.executable, ["make", "build/installed"], tmp_path, as_is)
        assert len({s.name for s in steps}) == len(steps)
        # Installing and building are guesses at their worst; what is measured must fit beside them.
        assert sum(s.seconds for s in steps if s.name not in ("install", "cpp")) < 530
        assert all(s.command[0] in (sys.executable, "make", "compute-sanitizer", gpu.PROGRAM) for s in steps)
    with pytest.raises(ValueError, match="no part"):
        gpu.steps_of("nonsense", sys.executable, [], tmp_path, True)


def test_the_script_for_the_sanitizers_is_right_on_the_cpu(monkeypatch, capsys):
    from tests import sanitized

    monkeypatch.setenv("FUSEDMERGE_BACKEND", "cpu")
    sanitized.main("cpu")
    assert "cpu: right" in capsys.readouterr().out
    monkeypatch.setattr(sanitized.fm, "lora_linear", lambda x, weight, *rest: x @ weight.T)  # without its adapters
    with pytest.raises(AssertionError, match="lora_linear"):
        sanitized.main("cpu")
