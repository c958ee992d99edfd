"""`make gpu [PART=...]`: what needs a GPU, part by part, each within a time budget.

    PART       what it does
    tests      fusedmerge doctor; pytest -m gpu, what only a GPU can show first; the C++ library built and its program's GPU part
    sanitize   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) on that program and on tests/sanitized.py
    micro      the questions M0-M6 (perf/micro, docs/tuning.md)
    switch     perf/test_switch.py, test_scaling.py, test_overhead.py
    decode     perf/test_lora_linear.py, test_decode.py, ablations.py
    sgmv       perf/test_sgmv.py
    accuracy   perf/accuracy in its GPU setting

A part is a list of steps, most valuable first. Each writes its results itself, as they come; one that does not fit into what is left of the
budget is not begun, and one that outlasts it is ended. The exit code is 0 only if every step ran and was right. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["Step", "main", "run_part", "steps_of"]

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "build/cpp/example/mixture"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
MICRO = {"m0": 40, "m1": 75, "m2": 40, "m3": 45, "m4": 45, "m5": 55, "m6": 105}  # seconds with start-up; guesses until measured
ONLY_ON_GPU = (
    "tests/test_gpu.py",
    "tests/test_gpu_linear.py",
    "tests/test_gpu_ops.py",
    "tests/test_sgmv.py",
    "tests/moe/test_decoder_gpu.py",
)
SUITES = {
    "switch": {"perf/test_switch.py": 300, "perf/test_scaling.py": 120, "perf/test_overhead.py": 60},
    "decode": {"perf/test_lora_linear.py": 40, "perf/test_decode.py": 330, "perf/ablations.py": 60},
    "sgmv": {"perf/test_sgmv.py": 250},
}
PARTS = ("tests", "sanitize", "micro", "switch", "decode", "sgmv", "accuracy")
CUT = "the time budget is used up"  # what a suite says of benchmarks that it left out
HUNG = 120  # seconds after which a test is taken for one that waits for ever
GRACE = 4.0  # seconds that a step has to end by itself, after each signal
LEAST_SHARE = 0.5  # of a step's estimate that must be left for it to begin


@dataclass(frozen=True)
class Step:
    """One command of a part. "{left}" in it becomes the seconds that are left."""

    name: str
    command: tuple[str, ...]
    seconds: float  # estimate
    needs: tuple[str, ...] = ()  # paths below the repository's root
    expect: str = ""  # a regular expression that its output must have
    refuse: str = ""  # one that it must not have
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    """What came of a step."""

    name: str
    verdict: str  # "passed", or what is wrong
    seconds: float = 0.0


def steps_of(part: str, python: str, install: Sequence[str], results: Path, as_is: bool) -> list[Step]:
    """A part's steps. `install`: the command that installs the package; `as_is`: into the environment at hand (VENV=none)."""
    prepare = Step("install", tuple(install), 150)
    # Another compiler's warnings are not what a GPU's time is for.
    cpp = Step("cpp", ("make", "cpp", "CMAKE_FLAGS=-DCMAKE_COMPILE_WARNING_AS_ERROR=OFF"), 120)
    if part == "tests":
        doctor = Step("doctor", (python, "-m", "fusedmerge", "doctor"), 15, refuse=r"backend (jit|aot) +unusable")
        # Processes share the GPU: the tests' time is their float64 truths and the kernels' compilation.
        how = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "--benchmark-disable", "--numprocesses", "auto", "--maxprocesses", "8")
        how += ("-o", f"faulthandler_timeout={HUNG}", "-o", "faulthandler_exit_on_timeout=true")  # of one process; the others go on
        two = (("OMP_NUM_THREADS", "2"),)
        ignored = tuple(f"--ignore={path}" for path in ONLY_ON_GPU)
        first = Step("pytest, what only a GPU can show", (python, "-m", "pytest", *how, *ONLY_ON_GPU), 120, environment=two)
        rest = Step("pytest, what every backend does", (python, "-m", "pytest", *how, *ignored, "tests"), 120, environment=two)
        program = Step("program", (PROGRAM,), 5, expect=r"GPU part: .* 0 wrong weights")
        return [prepare, doctor, first, rest, cpp, program]
    if part == "sanitize":
        sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--print-limit", "20", "--tool")
        # memcheck would count what torch asks of the driver in vain as it starts; our own calls are checked where they are made.
        tools = {tool: (tool, "--report-api-errors", "no") if tool == "memcheck" else (tool,) for tool in TOOLS}
        whole = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # every tensor an allocation of its own: bounds are seen
        programs = [Step(f"{tool}, C++", (*sanitizer, tool, PROGRAM), 15, expect=r"GPU part: .* 0 wrong weights") for tool in TOOLS]
        script = ("--kernel-name", "kns=fusedmerge", python, "-m", "tests.sanitized")
        scripts = []
        for backend in ("jit", "aot"):
            for tool in TOOLS:
                # What others' kernels have written is only seen where they are looked at too.
                command = (*sanitizer, *tools[tool], *(script[2:] if tool == "initcheck" else script), backend)
                scripts.append(Step(f"{tool}, Python, {backend}", command, 40, ("tests/sanitized.py",), f"{backend}: right", whole))
        return [cpp, *programs, prepare, *scripts]
    if part == "micro":
        commands = [Step(name, (python, "-m", "perf.micro", name, "--results", str(results)), t) for name, t in MICRO.items()]
        return commands if as_is else [prepare, *commands]  # from a checkout nothing needs to be built
    if part in SUITES:
        how = ("-q", "-s", "-p", "no:cacheprovider", "--results", str(results), "--budget", "{left}")
        return [prepare, *(Step(path, (python, "-m", "pytest", path, *how), t, (path,), refuse=CUT) for path, t in SUITES[part].items())]
    if part == "accuracy":
        # It keeps finished runs in build/accuracy: one that was ended goes on when it is called again.
        command = (python, "-m", "perf.accuracy", "--setting", "gpu", "--results", str(results))
        return [prepare, Step("accuracy", command, 500, ("perf/accuracy/__main__.py",))]
    raise ValueError(f"no part {part!r}: {', '.join(PARTS)}")


def run_part(steps: Sequence[Step], budget: float, log: IO[str], environment: dict[str, str] | None = None) -> list[Outcome]:
    """Run the steps in order within `budget` seconds; output goes to the terminal and to `log`."""
    end = time.monotonic() + budget
    outcomes = []
    for step in steps:
        left = end - time.monotonic()
        missing = [path for path in step.needs if not (ROOT / path).exists()]
        if missing:
            outcome = Outcome(step.name, f"is not there: {', '.join(missing)}")
        elif not shutil.which(step.command[0], path=(environment or os.environ).get("PATH")) and not (ROOT / step.command[0]).exists():
            outcome = Outcome(step.name, f"is not there: {step.command[0]}")
        elif left < LEAST_SHARE * step.seconds:
            outcome = Outcome(step.name, f"not begun: {left:.0f} s are left of the budget, about {step.seconds:.0f} s are needed")
        else:
            outcome = _run(step, left, log, environment)
        outcomes.append(outcome)
        _say(f"== {step.name}: {outcome.verdict} ({outcome.seconds:.1f} s)", log)
    return outcomes


def _run(step: Step, left: float, log: IO[str], environment: dict[str, str] | None) -> Outcome:
    command = [word.replace("{left}", f"{left - 5:.0f}") for word in step.command]
    _say(f"== {step.name}: {' '.join(command)}", log)
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**(environment or os.environ), **dict(step.environment)}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    ended = _Ender(process, left)
    found, refused = not step.expect, ""
    for line in process.stdout or ():
        _say(line.rstrip("\n"), log)
        found = found or bool(re.search(step.expect, line))
        refused = line.strip() if step.refuse and re.search(step.refuse, line) else refused
    code = process.wait()
    ended.cancel()
    if ended.fired:
        verdict = "ended: the budget is used up"
    elif code:
        verdict = f"failed: exit code {code}"
    elif refused:
        verdict = f"not finished: {refused}"
    else:
        verdict = "passed" if found else f"failed: no line like {step.expect!r}"
    return Outcome(step.name, verdict, time.monotonic() - start)


class _Ender:
    """Ends a process and its children when its time is over."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.fired = False
        self._process = process
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        self.fired = True
        for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # at the first one pytest tells what has failed
            try:
                os.killpg(self._process.pid, signal_)
                self._process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def cancel(self) -> None:
        self._timer.cancel()


def _say(text: str, log: IO[str]) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def gpu() -> tuple[str, str] | None:
    """The first GPU's name and compute capability; None if there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(query, check=False, capture_output=True, text=True)
    except OSError:
        return None
    name, _, capability = done.stdout.strip().rpartition(", ")
    return (name, capability) if done.returncode == 0 and name else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all of them)")
    parser.add_argument("--budget", type=float, default=530, help="seconds for each part")
    parser.add_argument("--only", default="", help="a regular expression: run the steps whose names have it")
    parser.add_argument("--results", type=Path, default=ROOT / "perf/results", help="where <device>/<suite>.json is written")
    parser.add_argument("--log", type=Path, default=ROOT / "build/gpu.log", help="a copy of all output")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--install", default="true", help="the command that installs the package")
    parser.add_argument("--as-is", action="store_true", help="into the environment at hand (VENV=none)")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    found = gpu()
    if found is None:
        print("make gpu: no NVIDIA GPU here (nvidia-smi finds none)", file=sys.stderr)
        return 1
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PATH"] = os.pathsep.join((environment.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    environment.setdefault("FUSEDMERGE_CUDA", "ON")  # an extension without kernels would be found out too late
    # Only this GPU's machine code: a build for four architectures would take most of the budget.
    environment.setdefault("FUSEDMERGE_CUDA_ARCH_LIST", "9.0a" if found[1] == "9.0" else found[1])
    given.log.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    with given.log.open("w") as log:
        _say(f"{found[0]}, compute capability {found[1]}", log)
        for part in given.parts or PARTS:
            steps = steps_of(part, given.python, given.install.split(), given.results.resolve(), given.as_is)
            chosen = [step for step in steps if re.search(given.only, step.name) or step.name in ("install", "cpp")]
            outcomes = run_part(chosen, given.budget, log, environment)
            lines += [(f"{part}: {outcome.name}", outcome.verdict, outcome.seconds) for outcome in outcomes]
        for name, verdict, seconds in lines:
            _say(f"{name:40} {seconds:7.1f} s  {verdict}", log)
    return 0 if lines and all(verdict == "passed" for _, verdict, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
