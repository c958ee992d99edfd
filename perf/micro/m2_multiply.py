"""M2: how deep a product does a copy hide, and what are the tensor cores' peaks? Decides from which depth on wgmma is needed."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from perf.micro.device import pointer, run_for
from perf.micro.m0_copy import same
from perf.micro.session import Session, require

if TYPE_CHECKING:
    import torch

TITLE = "M2: a copy of {gb:.2f} GB with 0 to 512 ranks of mma beside it; peaks of mma and wgmma; clocks and power"
DEPTHS = (128, 0, 256, 32, 64, 512)
COLS, UNIT_ROWS, CHUNK = 4096, 2048, 128
SHARED = 5 * 64 * (2 * CHUNK + 16)
WGMMA_SHARED = 4 * (64 + 256) * 16 * 2


class MultiplyCopy(ctypes.Structure):
    """multiply.cu's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "target", "b", "strip")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "unit_rows", "b_rows", "num_slices")),
        ("coefficient", ctypes.c_float),
    ]


def measure(session: Session) -> None:
    copies(session)
    peaks(session)


def copies(session: Session) -> None:
    device = session.device
    rows = session.sizes.copy_bytes // (2 * COLS) // UNIT_ROWS * UNIT_ROWS
    size = 2 * rows * COLS
    source, target = session.buffer(size), session.buffer(size)
    b_rows = 1 << 16
    b, strip = session.buffer(2 * CHUNK * b_rows), session.buffer(256 * 64 * 4)
    for depth in DEPTHS:
        params = MultiplyCopy(*map(pointer, (source, target, b, strip)), rows, COLS, UNIT_ROWS, b_rows, depth // 16, 0.0)

        def run(params: MultiplyCopy = params) -> None:
            device.launch("multiply", "multiply_copy", device.num_multiprocessors, 256, params, shared_bytes=device.shared_for(1, SHARED))

        target.fill_(0.0)
        run()
        require(same(source, target), f"depth {depth}: not a copy")
        check_product(session, source, b, strip, depth)
        seconds, clocks = device.samples(run, session.sizes.samples), settled(session, run)
        title = f"copy + {depth} ranks of mma"
        session.record(
            f"copy_mma_{depth}", "copy + mma", title, seconds, bytes=2 * size, flops=2 * rows * COLS * depth, depth=depth, **clocks
        )


def check_product(session: Session, source: torch.Tensor, b: torch.Tensor, strip: torch.Tensor, depth: int) -> None:
    """The first step of the first block with a coefficient of 1, against float64: the products that are timed are made."""
    import torch

    device, size = session.device, UNIT_ROWS * COLS
    target = torch.zeros(size, dtype=torch.bfloat16, device=device.where)
    pointers = map(pointer, (source, target, b, strip))
    params = MultiplyCopy(*pointers, UNIT_ROWS, COLS, UNIT_ROWS, len(b) // CHUNK, depth // 16, 1.0)
    device.launch("multiply", "multiply_copy", device.num_multiprocessors, 256, params, shared_bytes=device.shared_for(1, SHARED))
    a, wide = strip_matrix(strip), b[: 64 * CHUNK * max(1, depth // CHUNK)].view(-1, 64, CHUNK).double()
    truth = source[:size].view(UNIT_ROWS, COLS)[:64, :256].double()
    terms = truth.abs()
    for chunk in range(-(-depth // CHUNK)):
        ranks = min(CHUNK, depth - chunk * CHUNK)
        truth = truth + wide[chunk][:, :ranks] @ a[:ranks]
        terms = terms + wide[chunk][:, :ranks].abs() @ a[:ranks].abs()
    error = (target.view(UNIT_ROWS, COLS)[:64, :256].double() - truth).abs()
    require((error <= 2**-8 * truth.abs() + 2**-16 * terms).all(), f"depth {depth}: wrong products")


def strip_matrix(strip: torch.Tensor) -> torch.Tensor:
    """A [128, 256] in float64 from its fragments [8 warps, 32 lanes, 8 slices, 4 tiles, 2 words, 2 values] (switch_mma.cuh's layout)."""
    import torch

    values = strip.view(8, 32, 8, 4, 2, 2)
    warp, lane, piece, tile, word, value = torch.meshgrid(*(torch.arange(n, device=strip.device) for n in values.shape), indexing="ij")
    rank = 16 * piece + 8 * word + 2 * (lane % 4) + value
    col = 32 * warp + 8 * (lane // 8) + 2 * tile + lane // 4 % 2
    found = torch.zeros(CHUNK, 256, dtype=torch.float64, device=strip.device)
    found[rank, col] = values.double()
    return found


def peaks(session: Session) -> None:
    device = session.device
    words = session.buffer(4 * 10240)
    iterations = max(64, int(4096 * session.sizes.settle_seconds) * 16)
    kinds = [("mma", 1, 8 * 2 * 64 * 32 * 16), ("mma", 2, 8 * 2 * 64 * 32 * 16)]
    if device.has_wgmma:
        kinds.append(("wgmma", 1, 2 * 2 * 64 * 256 * 16))
    for kind, blocks, flops in kinds:
        grid = blocks * device.num_multiprocessors
        sums = session.buffer(4 * grid * 256).view(_float32())

        def run(count: int = iterations, kind: str = kind, grid: int = grid, blocks: int = blocks, sums: Any = sums) -> None:
            shared = device.shared_for(blocks, WGMMA_SHARED)
            device.launch("multiply", f"{kind}_peak", grid, 256, words, sums, count, shared_bytes=shared)

        found = []
        for count in (32, 64):
            sums.fill_(float("nan"))
            run(count)
            found.append(sums.double().clone())
        size = found[1].norm()
        require(
            size.isfinite() and size > 0 and (found[1] - 2 * found[0]).norm() < 1e-3 * size, f"{kind}: twice the work, not twice the sum"
        )
        seconds, clocks = device.samples(run, session.sizes.samples), settled(session, run)
        title = f"{kind}, operands on the chip, {blocks} block(s) per SM"
        session.record(f"{kind}_peak_{blocks}", "peak", title, seconds, flops=flops * iterations * grid, **clocks)


def settled(session: Session, run: Any) -> dict[str, Any]:
    """Clocks and power while `run` goes on and on."""
    with session.device.watched() as clocks:
        run_for(session.sizes.settle_seconds, run, session.device.synchronize)
    return {"clocks": clocks}


def _float32() -> Any:
    import torch

    return torch.float32
