"""M1: how should a switch walk a matrix? Row segments, unit orders, a side stream through L2, cache policies.

Decides strip width, order of units, policy. `ncu`, where it is, counts the bytes that DRAM and L2 move.
"""

from __future__ import annotations

import csv
import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from perf.micro.device import HERE, pointer
from perf.micro.m0_copy import same
from perf.micro.session import Session, require

if TYPE_CHECKING:
    import torch

TITLE = "M1: tiled copies of {gb:.2f} GB: row segments, orders of units, a side stream through L2, cache policies"
KERNELS = ("128", "256", "512", "lanes", "1024")
ORDERS = ("strips first", "panels first", "a run of units per block")
ROW_BYTES, UNIT_ROWS, STEP_BYTES = 8192, 2048, 32768
PIECE, SIDE_STAGES = 4096, 3
PROFILED = 9  # segments, and the side stream with each policy
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum"


class TiledCopy(ctypes.Structure):
    """copy.cu's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "target", "side")),
        ("side_bytes", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "row_bytes", "unit_rows", "order", "side_pieces", "evict_first")),
    ]


def variants() -> list[dict[str, Any]]:
    """What is tried, most telling first."""
    plain = {"order": 0, "side_pieces": 0, "evict_first": 1, "blocks": 1}
    found = [{**plain, "kernel": kernel} for kernel in KERNELS]
    found += [{**plain, "kernel": kernel, "side_pieces": 8, "evict_first": evict} for kernel in ("lanes", "512") for evict in (1, 0)]
    found += [{**plain, "kernel": kernel, "order": order} for kernel in KERNELS for order in (1, 2)]
    found += [{**plain, "kernel": kernel, "blocks": 2} for kernel in KERNELS]
    found += [{**plain, "kernel": kernel, "evict_first": 0} for kernel in KERNELS]
    found += [{**plain, "kernel": k, "side_pieces": n, "evict_first": e} for k in ("lanes", "512", "1024") for n in (4, 16) for e in (1, 0)]
    return found


def measure(session: Session) -> None:
    rows = session.sizes.copy_bytes // ROW_BYTES // UNIT_ROWS * UNIT_ROWS
    size = rows * ROW_BYTES
    source, target, side = session.buffer(size), session.buffer(size), side_stream(session)
    for variant in variants():
        run = launcher(session, source, target, side, variant)
        if run is None:
            continue
        target.fill_(0.0)
        run()
        require(same(source, target), f"{variant}: not a copy")
        seconds = session.device.samples(run, session.sizes.samples)
        share = variant["side_pieces"] * PIECE / (2 * STEP_BYTES)
        title = f"{variant['kernel']}, {ORDERS[variant['order']]}, {variant['blocks']} block(s) per SM"
        title += f", side stream {share:g}x" * bool(share) + ", evict-first" * variant["evict_first"]
        name = "_".join(str(variant[key]) for key in ("kernel", "order", "blocks", "side_pieces", "evict_first"))
        group = "tiled copy beside a side stream" if share else "tiled copy"
        session.record(name, group, title, seconds, bytes=2 * size, side_bytes=int(share * 2 * size), **variant)
    session.suite.setting["ncu"] = profile()


def side_stream(session: Session) -> torch.Tensor:
    """What L2 keeps: about the chosen experts' factors of one layer."""
    return session.buffer(16 << 20)


def launcher(session: Session, source: torch.Tensor, target: torch.Tensor, side: torch.Tensor, variant: dict[str, Any]) -> Any:
    """A call that launches a variant; None where it does not fit into shared memory."""
    device = session.device
    shared = SIDE_STAGES * variant["side_pieces"] * PIECE
    if shared > device.shared_for(variant["blocks"]):
        return None
    params = TiledCopy(
        pointer(source), pointer(target), pointer(side), side.nbytes, source.nbytes // ROW_BYTES, ROW_BYTES, UNIT_ROWS,
        variant["order"], variant["side_pieces"], variant["evict_first"],
    )  # fmt: skip
    grid, kernel = variant["blocks"] * device.num_multiprocessors, f"tiled_copy_{variant['kernel']}"
    return lambda: device.launch("copy", kernel, grid, 256, params, shared_bytes=device.shared_for(variant["blocks"], shared))


# ---------------------------------------------------------------------- under ncu


def profile(seconds: float = 90) -> Any:
    """Bytes that DRAM and L2 moved for each variant of `main`, or why that is not known."""
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if not ncu:
        return "ncu is not installed"
    how = ["--csv", "--print-units", "base", "--clock-control", "none", "--metrics", METRICS, "-k", "regex:tiled_copy"]
    command = [ncu, *how, sys.executable, "-m", "perf.micro.m1_tiles"]
    process = subprocess.Popen(
        command, cwd=HERE.parents[1], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the program under it, which would disturb what is measured next
        return f"ncu took more than {seconds:g} s"
    return read_profile(output) or f"ncu: exit {process.returncode}: {output[-2000:]}"


def read_profile(text: str) -> list[dict[str, Any]]:
    """ncu's CSV, one entry for each launch in order: {"kernel": ..., metric: value}."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        entry = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        entry[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


def main() -> None:
    """What ncu looks at: the first variants once each, on 1 GB."""
    from dataclasses import replace
    from pathlib import Path

    from perf.micro.device import Device
    from perf.micro.session import LLAMA_2_7B

    session = Session("m1_profile", TITLE, Device(), replace(LLAMA_2_7B, copy_bytes=1 << 30), Path(), {})  # type: ignore[arg-type]
    source, target, side = session.buffer(1 << 30), session.buffer(1 << 30), side_stream(session)
    for variant in variants()[:PROFILED]:
        run = launcher(session, source, target, side, variant)
        if run is not None:
            run()
    session.device.synchronize()


if __name__ == "__main__":
    main()
