"""The `fusedmerge` command. Exit status: 0 done, 1 refused or failed (one line on stderr), 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from fusedmerge import __version__
from fusedmerge.errors import FusedMergeError, MissingFileError

__all__ = ["main"]

EXTRAS = {"transformers": "demo", "peft": "demo", "matplotlib": "demo", "pytest": "bench", "pytest_benchmark": "bench"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Usage errors leave through argparse's SystemExit(2)."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:  # `fusedmerge ... | head`
        sys.stdout = None
        return 1
    except FusedMergeError as error:
        print(f"fusedmerge: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"fusedmerge: {error.name} is not installed; pip install 'fusedmerge[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fusedmerge: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedmerge", description="LoRA mixtures at the speed of the backbone they adapt.")
    parser.add_argument("--version", action="version", version=f"fusedmerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    merge = commands.add_parser("merge", help="merge adapters into a Hugging Face checkpoint")
    merge.add_argument("--base", required=True, metavar="DIR", help="the checkpoint to merge into (it is not changed)")
    merge.add_argument(
        "--adapter", required=True, action="append", nargs="+", metavar="DIR[:GATE]",
        help="a PEFT adapter directory, with its gate (1.0 if left out); several make a mixture",
    )  # fmt: skip
    merge.add_argument("--out", required=True, metavar="DIR", help="the checkpoint to write")
    merge.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the merged weights (default: as the base)")
    merge.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing output")
    merge.add_argument("--quiet", action="store_true", help="no progress bar")
    merge.set_defaults(run=_merge)

    demo = commands.add_parser("demo", help="merge, switch and decode with a small model made on the spot, beside PEFT and float64")
    demo.add_argument("--out", default="demo-out", metavar="DIR", help="where to write the pictures, demo.json and the checkpoints")
    demo.add_argument("--switches", type=_positive, default=1000, metavar="N", help="switches in the drift table (default: 1000)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="what an adapter holds, or why it is refused")
    inspect.add_argument("directory", metavar="DIR", help="a PEFT adapter directory")
    inspect.add_argument("--base", metavar="DIR", help="a safetensors checkpoint to compare with: |delta|/|W|, what 16-bit rounding loses")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser("doctor", help="versions, GPU, compiler, backends, cache")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="run the benchmark suites of a checkout, into perf/results")
    bench.add_argument("--results", metavar="DIR", help="where to write (default: perf/results)")
    bench.add_argument("pytest", nargs="*", metavar="PYTEST_ARGUMENT", help="passed on after --, as in: fusedmerge bench -- -k unchanged")
    bench.set_defaults(run=_bench)

    plot = commands.add_parser("plot", help="make docs/results.md and its pictures from perf/results")
    plot.add_argument("--results", metavar="DIR", help="results to read (default: the checkout's perf/results)")
    plot.add_argument("--docs", metavar="DIR", help="where to write (default: the checkout's docs)")
    plot.set_defaults(run=_plot)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _merge(parsed: argparse.Namespace) -> int:
    from fusedmerge.checkpoint import merge_checkpoint, parse_adapter_argument

    adapters = [parse_adapter_argument(text) for texts in parsed.adapter for text in texts]
    merge_checkpoint(
        parsed.base, adapters, parsed.out, dtype=parsed.dtype, device=parsed.device, overwrite=parsed.overwrite, progress=not parsed.quiet
    )
    print(f"merged {len(adapters)} adapter{'s' if len(adapters) > 1 else ''} into {parsed.out}")
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the demo needs no network
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes lines of its own to stderr
    import transformers

    from fusedmerge.commands.demo import DemoConfig, run
    from fusedmerge.commands.demo_report import render

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # PEFT warns for each layer that a partial adapter leaves alone
    report = run(parsed.out, DemoConfig(switches=parsed.switches), progress=not parsed.quiet)
    print(render(report))
    out = Path(parsed.out)
    print(f"\n{report['seconds']:.0f} s. Written: {out / 'drift.png'}, {out / 'decode.png'}, {out / 'demo.json'}. Next:")
    print(f"  fusedmerge inspect {out / 'adapters' / 'math'} --base {out / 'base'}")
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from fusedmerge.commands.inspect import inspect_adapter, render

    try:
        found = inspect_adapter(parsed.directory, parsed.base)
    except FusedMergeError as error:
        if not parsed.json:
            raise
        print(json.dumps({"directory": parsed.directory, "refused": str(error), "field": error.field}, indent=1))
        return 1
    print(json.dumps(found.to_json(), indent=1) if parsed.json else render(found))
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from fusedmerge.commands.doctor import diagnose, render

    found = diagnose()
    print(json.dumps(found, indent=1) if parsed.json else render(found))
    return 0


def _checkout(operation: str, needed: str) -> Path:
    """The repository's root. Raises MissingFileError outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    for place in (root, Path.cwd()):
        if (place / needed).exists() and (place / "fusedmerge" / "cli.py").is_file():
            return place
    raise MissingFileError(operation, needed, "a checkout of the repository (an installed package has no benchmarks)", f"none at {root}")


def _bench(parsed: argparse.Namespace) -> int:
    import pytest_benchmark  # noqa: F401  (to say what is missing before pytest does)

    root = _checkout("bench", "perf/conftest.py")
    chosen = any((root / argument.partition("::")[0]).exists() for argument in parsed.pytest)  # else: all suites
    command = [sys.executable, "-m", "pytest", *([] if chosen else [str(root / "perf")]), "-q", "-p", "no:xdist", *parsed.pytest]
    if parsed.results:
        command.append(f"--results={Path(parsed.results).resolve()}")
    return subprocess.run(command, cwd=root, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


def _plot(parsed: argparse.Namespace) -> int:
    from fusedmerge.commands.plot import render_results

    if parsed.results and parsed.docs:
        written = render_results(Path(parsed.results), Path(parsed.docs))
    else:
        root = _checkout("plot", "perf")
        results, docs = Path(parsed.results or root / "perf" / "results"), Path(parsed.docs or root / "docs")
        written = render_results(results, docs, root / "README.md" if not parsed.docs else None)
    for path in written:
        print(path)
    return 0
