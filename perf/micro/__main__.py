"""`python -m perf.micro [m0 m1 ...]`: the questions to ask of a GPU first, each answered in a results file of its own.

Each runs in this process, one after the other; a wrong result ends its benchmark and the exit code, and its file is not completed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {
    "m0": "m0_copy", "m1": "m1_tiles", "m2": "m2_multiply", "m3": "m3_products", "m4": "m4_gemv", "m5": "m5_handover", "m6": "m6_backbone",
}  # fmt: skip
KERNEL_FILES = ("copy", "multiply", "gemv")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.micro", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", metavar="mN", help=f"which of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "perf/results", help="where <device>/micro_<name>.json is written")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    import torch

    if not torch.cuda.is_available():
        print("perf.micro: no CUDA device here: these measure a GPU, and nothing else", file=sys.stderr)
        return 2
    from perf.evidence import begin
    from perf.micro.device import Device, compile_kernels
    from perf.micro.session import LLAMA_2_7B

    began, device = begin(), Device()
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: compile_kernels(name, device.architecture, ROOT / "build/micro"), KERNEL_FILES))
    print(f"{device.name}, {device.architecture}; kernels compiled in {time.monotonic() - start:.1f} s", flush=True)
    sizes = LLAMA_2_7B.fitted(device.free_bytes())
    failed = [name for name in given.names or BENCHMARKS if not run(name, device, sizes, given.results, began)]
    if failed:
        print(f"perf.micro: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, device: Any, sizes: Any, results: Path, began: dict[str, Any]) -> bool:
    """One benchmark; says whether its results are right."""
    import torch

    from perf.micro.session import Session

    module = importlib.import_module(f"perf.micro.{BENCHMARKS[name]}")
    title = module.TITLE.format(gb=sizes.copy_bytes / 1e9, layers=sizes.layers)
    session = Session(f"micro_{name}", title, device, sizes, results, began)
    start = time.monotonic()
    try:
        module.measure(session)
    except Exception:
        traceback.print_exc()
        session.write()
        return False
    finally:
        gc.collect()
        if device.where == "cuda":
            torch.cuda.empty_cache()
    session.finish()
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
