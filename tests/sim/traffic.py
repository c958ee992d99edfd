"""What each kernel asks of memory, counted while the PTX machine executes what nvcc made of it.

`python tests/sim/traffic.py [--markdown FILE]`. Counted, not timed: bytes, 32-byte sectors, warp instructions of the PTX, shared-memory
wavefronts. perf/model.py says what must move.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import harness
import mixtures
import numpy as np
import torch
from harness import BF16, FP8, Launch, make_target

import build

sys.path.insert(0, str(build.ROOT))

from fusedmerge.backend import linear
from fusedmerge.backend.kernels import SimLauncher
from perf import cubin, model
from perf.launches import MULTIPROCESSORS
from perf.model import Cost
from perf.occupancy import DEVICES
from tests import linear_kit

# Of an H200's multiprocessors in a second, under load (assumed): four instructions and one wavefront each.
CLOCKS = MULTIPROCESSORS * 1.75e9
BANDWIDTH = DEVICES["H200"]
ARCHITECTURE = "compute_90"


class Traffic(ctypes.Structure):
    """fusedmerge::ptx::Traffic."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "instructions",
            "read",
            "read_sectors",
            "written",
            "written_sectors",
            "touched_read",
            "touched_written",
            "shared",
            "conflicts",
        )
    ]


def total(parts: list[Traffic]) -> Traffic:
    return Traffic(*(sum(getattr(part, name) for part in parts) for name, _ in Traffic._fields_))


@dataclass(frozen=True)
class Row:
    """One launch (or several, where the model counts them together), and what it must move at least."""

    name: str
    case: str
    must: Cost | None
    traffic: Traffic


@contextmanager
def counting(library: ctypes.CDLL, ptx: bytes) -> Iterator[Callable[[], Traffic]]:
    """Inside, launches execute PTX; a call tells the traffic since the last one."""

    def take() -> Traffic:
        found = Traffic()
        library.fm_sim_traffic(ctypes.byref(found))
        return found

    library.fm_sim_use_ptx(ptx, 1)
    take()
    try:
        yield take
    finally:
        library.fm_sim_use_ptx(None, 0)


class Counting(SimLauncher):
    """Notes the traffic of each launch. A device as large as an H200."""

    num_multiprocessors = MULTIPROCESSORS
    shared_bytes_limit = 227 << 10

    def __init__(self, take: Callable[[], Traffic]) -> None:
        super().__init__()
        self.take = take
        self.found: list[tuple[str, Traffic]] = []

    def launch(self, kernel, params, grid, shared_bytes, programmatic=False) -> None:  # type: ignore[no-untyped-def]
        super().launch(kernel, params, grid, shared_bytes, programmatic)
        self.found.append((kernel.name, self.take()))


def switch(library: ctypes.CDLL, ptx: bytes, rows: int, cols: int, r: int, *, source: int = BF16, inplace: bool = False, k: int = 2) -> Row:
    """One matrix to a mixture of k experts (0: restored)."""
    target = make_target(np.random.default_rng(0), rows, cols, rank=r, live=BF16, source=source)
    launch = Launch(library, [target], BF16, source, BF16, inplace=inplace, shared_limit=227 << 10)
    target.live[:] = harness.encode(harness.base_values(target, source), BF16)
    with counting(library, ptx) as take:
        launch.switch([1, 0], [0.7, 0.3])
        if inplace or k == 0:
            take()
            launch.switch([2, 3][:k], [0.6, 0.4][:k])
        found = take()
    shapes = [(rows, cols)]
    must = model.switch_inplace(shapes, r, k) if inplace else model.switch_exact(shapes, r, k, 1 if source == FP8 else 2)
    kind = "in place" if inplace else "restore" if k == 0 else "exact, fp8 base" if source == FP8 else "exact"
    return Row("switch", f"{kind}, r = {r}", must, found)


def linears(library: ctypes.CDLL, ptx: bytes, tokens: int, r: int, cols: int = 4096, rows: int = 2112) -> list[Row]:
    """Prologue and GEMV, and both together beside the model. r = 0: no adapters."""
    problem = linear_kit.make(tokens, cols, rows=(rows,), ranks=(max(r, 1),), adapters=8, extras=False)
    ids = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:2] for t in range(tokens)]).int()
    with counting(library, ptx) as take:
        launcher = Counting(take)
        linear.decode_group(launcher, problem.x, problem.targets, linear.Known(ids, problem.gates) if r else None)
    whole = total([found for _, found in launcher.found])
    must = model.lora_linear(rows, cols, r, 8, 2, tokens, len(ids.unique())) if r else model.linear(rows, cols, tokens)
    case = f"T = {tokens}, r = {r}" if r else f"T = {tokens}, no adapter"
    return [Row(name.split("_")[0], case, None, found) for name, found in launcher.found if r] + [Row("a linear", case, must, whole)]


def sgmv(library: ctypes.CDLL, ptx: bytes, tokens: int, r: int, popularity: str, adapters: int = 8, size: int = 1024) -> list[Row]:
    """Shrink and expand of many tokens, two experts each."""
    rng = np.random.default_rng(0)
    batch = mixtures.make_batch(rng, tokens, size, size, r, adapters=adapters, popularity=popularity, none=0.0)
    with counting(library, ptx) as take:
        launcher = Counting(take)
        batch.run(launcher)
    case = f"T = {tokens}, r = {r}, {popularity}, N = {adapters}"
    names: dict[str, list[Traffic]] = {}
    for name, found in launcher.found:
        names.setdefault("grouping" if name.startswith("group") else name.removesuffix("_bf16"), []).append(found)
    sums = {name: total(found) for name, found in names.items()}
    must = model.adapters(size, size, r, 2, tokens, len(batch.ids.unique()))
    return [Row(name, case, None, found) for name, found in sums.items()] + [Row("SGMV", case, must, total(list(sums.values())))]


def all_rows(library: ctypes.CDLL, ptx: bytes) -> list[Row]:
    """The sheet's cases: columns as Llama-2-7B has them, rows as many as take seconds."""
    rows = [switch(library, ptx, 2048, 1024, 16), switch(library, ptx, 2048, 1024, 64), switch(library, ptx, 2048, 1024, 64, source=FP8)]
    rows += [switch(library, ptx, 2048, 1024, 64, inplace=True), switch(library, ptx, 2048, 1024, 64, k=0)]
    for tokens, r in ((1, 0), (1, 16), (1, 64), (8, 0), (8, 16), (16, 0), (16, 16), (16, 64)):
        rows += linears(library, ptx, tokens, r)
    for tokens, r, popularity, adapters in (
        (512, 16, "uniform", 8),
        (512, 64, "identical", 8),
        (512, 16, "uniform", 64),
        (64, 16, "uniform", 8),
    ):
        rows += sgmv(library, ptx, tokens, r, popularity, adapters)
    return rows


def markdown(rows: list[Row]) -> str:
    lines = [
        "# What the kernels ask of memory",
        "",
        "Written by `python tests/sim/traffic.py --markdown docs/kernels/traffic.md`: counted while the PTX machine (tests/sim/ptx.h)",
        "executes what nvcc makes of the kernels for compute capability 9.0. **Nothing here was timed.**",
        "",
        "- must: bytes that perf/model.py says have to move. moved: different 32-byte sectors read and written, over that.",
        "- through L2: sectors asked for by each warp's access, over the same bytes: what L2 and L1 serve.",
        "- issue: warp instructions (of the PTX; the machine code has about as many) over an H200's issue slots (132 x 4 a clock, 1.75 GHz",
        "  assumed), in the time that 4.8 TB/s take for the bytes. Near 1 and beyond, instructions are the limit and not memory.",
        "- prefetches count as instructions, not as bytes.",
        "- shared: shared-memory wavefronts over the clocks of that time, one a clock. conflicts: those of them beyond one for each 128",
        "  bytes of an access.",
        "",
        "bf16, k = 2 of 8 experts; switch 2048 x 1024; linears 2112 x 4096; SGMV 1024 x 1024.",
        "",
        "| kernel | case | must, MB | moved | through L2 | instructions a KB | issue | shared | conflicts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)]) + "\n"


def line(row: Row) -> str:
    """The sheet's line."""
    found = row.traffic
    moved, asked = 32 * (found.touched_read + found.touched_written), 32 * (found.read_sectors + found.written_sectors)
    must = row.must.bytes if row.must else moved
    clocks = CLOCKS * must / BANDWIDTH
    issue, shared = found.instructions / (4 * clocks), (found.shared + found.conflicts) / clocks
    first = f"{must / 1e6:.2f} | {moved / must:.3f}" if row.must else f"({moved / 1e6:.2f}) | "
    conflicts = f"{found.conflicts / max(found.shared, 1):.0%}"
    cells = (row.name, row.case, first, f"{asked / must:.2f}", f"{1024 * found.instructions / must:.0f}", f"{issue:.2f}", f"{shared:.2f}")
    return f"| {' | '.join((*cells, conflicts))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="write the sheet there, too")
    given = parser.parse_args()
    nvcc = cubin.find_tool("nvcc")
    if nvcc is None:
        sys.exit("traffic: nvcc is not installed")
    path = build.build()
    os.environ["FUSEDMERGE_SIM_LIB"] = str(path)
    text = markdown(all_rows(harness.load(path), build.ptx(nvcc, ARCHITECTURE).read_bytes()))
    print(text, end="")
    if given.markdown:
        given.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
