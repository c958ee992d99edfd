"""Builds the host simulator from the kernel sources: `python tests/sim/build.py [--sanitize]`, a plain g++ (or $CXX) and nothing else.

The library is `build/sim/libfusedmerge_sim.so`, or `libfusedmerge_sim_asan.so` with --sanitize: `make sim-sanitize` runs it.
`ptx` makes build/sim/kernels_compute_90.ptx, what nvcc makes of the same kernels, for the machine in the library that executes it.
A build is skipped while no source is newer than it, and replaces its file by rename, so that two builds at once do no harm.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIM = Path(__file__).resolve().parent
HOST = [ROOT / f"cuda/src/{name}.cpp" for name in ("plan", "describe", "kernels")]
KERNELS = [SIM / "interface.cpp", *(ROOT / f"cuda/src/kernels_{name}.cu" for name in ("linear", "sgmv"))]  # what contains kernels
MACHINES = ("simulator", "warp", "numbers", "faults", "ptx_parse", "ptx_machine", "ptx_decode", "ptx_memory")
UNITS = [*KERNELS, *(SIM / f"{name}.cpp" for name in MACHINES), *HOST]
PACKAGE = ROOT / "fusedmerge/__init__.py"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE", "-fvisibility=default"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]


def sources(root: Path = ROOT) -> list[Path]:
    """Every file that the library is made of."""
    found = [*(root / "cuda/include").rglob("*.cuh"), *(root / "cuda/src").glob("*.h"), *(root / "tests/sim").glob("*.h")]
    return [*found, *(root / unit.relative_to(ROOT) for unit in UNITS)]


def version() -> str:
    """The package's, read and not imported: a build needs no installation."""
    return re.findall(r'^__version__ = "(.+)"$', PACKAGE.read_text(), re.MULTILINE)[0]


def library(sanitize: bool = False) -> Path:
    return ROOT / "build/sim" / ("libfusedmerge_sim_asan.so" if sanitize else "libfusedmerge_sim.so")


def is_stale(target: Path) -> bool:
    return not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in [*sources(), Path(__file__), PACKAGE])


def compile_library(target: Path, root: Path = ROOT, extra: list[str] | None = None, reuse: Mapping[str, Path] | None = None) -> Path:
    """Compiles the sources under `root` into `target`; `reuse` names object files for units that need no compiling."""
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{root / 'cuda/include'}", f"-I{root / 'cuda/src'}", f"-I{root / 'tests/sim'}"]
    stated = f'-DFUSEDMERGE_VERSION="{version()}"'
    scratch = target.with_suffix(f".{os.getpid()}")

    def compile_unit(unit: Path) -> Path:
        if reuse and unit.stem in reuse:
            return reuse[unit.stem]
        output = scratch.with_name(f"{scratch.name}.{unit.stem}.o")
        command = [*compiler, *FLAGS, stated, *(extra or []), *includes, "-xc++", "-c", str(root / unit.relative_to(ROOT))]
        subprocess.run([*command, "-o", str(output)], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, UNITS))
    linked = scratch.with_name(f"{scratch.name}.so")
    subprocess.run([*compiler, "-shared", *(extra or []), *map(str, objects), "-o", str(linked)], check=True)
    linked.replace(target)
    for path in objects:
        if not reuse or path not in reuse.values():
            path.unlink()
    return target


def build(sanitize: bool = False) -> Path:
    """The library, compiled only if a source is newer."""
    return _once(library(sanitize), lambda target: compile_library(target, extra=SANITIZE if sanitize else None))


def ptx(nvcc: str, architecture: str) -> Path:
    """The PTX of every kernel in the ahead-of-time library, for "compute_90" and the like."""

    def compile_ptx(target: Path) -> None:
        command = [nvcc, "-std=c++17", "-ptx", f"-arch={architecture}", f"-I{ROOT / 'cuda/include'}", f"-I{ROOT / 'cuda/src'}"]
        sources = [ROOT / f"cuda/src/{name}.cu" for name in ("instances", "kernels_linear", "kernels_sgmv")]
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitizer for nvcc
        parts = [target.with_suffix(f".{os.getpid()}.{source.stem}") for source in sources]
        for source, part in zip(sources, parts, strict=True):
            subprocess.run([*command, "-o", str(part), str(source)], check=True, env=environment)
        parts[0].write_text("".join(part.read_text() for part in parts))
        parts[0].replace(target)
        for part in parts[1:]:
            part.unlink()

    return _once(ROOT / f"build/sim/kernels_{architecture}.ptx", compile_ptx)


def _once(target: Path, make: Callable[[Path], object]) -> Path:
    """The target, made only if a source is newer; parallel test processes make it once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_stale(target):
            make(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    print(build(parser.parse_args().sanitize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
