"""M0: how fast is a copy, and how many bytes must be in flight for it? Decides the denominators and the depth of the pipelines."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from perf.micro.device import pieces
from perf.micro.session import Session, require

if TYPE_CHECKING:
    import torch

TITLE = "M0: copy and read of {gb:.2f} GB by memcpy, plain loads, cp.async and bulk copies"
THREADS, STAGE = 256, 8192
GRANULE = 32768  # bytes that every kernel here divides

# (kernel, loads or stages ahead, blocks per multiprocessor): KB in flight per multiprocessor
PLAIN = [("plain_4", 4, 1), ("plain_4", 4, 2), ("plain_8", 8, 1), ("plain_4", 4, 4), ("plain_8", 8, 2), ("plain_8", 8, 4)]
AHEAD = [(2, 1), (4, 1), (8, 1), (4, 2), (16, 1), (8, 2)]


def measure(session: Session) -> None:
    device = session.device
    size = session.sizes.copy_bytes // GRANULE * GRANULE
    source, target = session.buffer(size), session.buffer(size)
    total = word_sum(source)

    session.record("memcpy", "copy", "cudaMemcpyAsync", device.samples(lambda: target.copy_(source), session.sizes.samples), bytes=2 * size)

    def kernel(action: str, name: str, in_flight: int, blocks: int, shared: int, *more: int) -> None:
        grid = blocks * device.num_multiprocessors
        sums = target[: 2 * grid * THREADS] if action == "read" else None
        into = target if sums is None else sums
        arguments = (source, into, ctypes.c_longlong(size), *more)

        def run() -> None:
            device.launch("copy", f"{action}_{name}", grid, THREADS, *arguments, shared_bytes=device.shared_for(blocks, shared))

        into.fill_(0.0)
        run()
        if sums is None:
            require(same(source, target), f"{action}_{name}: not a copy")
        else:
            require(word_sum(sums) == total, f"{action}_{name}: not every byte was read")
        seconds = device.samples(run, session.sizes.samples)
        title = f"{name.partition('_')[0]}, {in_flight >> 10} KB in flight, {blocks} block(s) per SM"
        moved = size if sums is not None else 2 * size
        details = {"bytes": moved, "bytes_in_flight": in_flight, "blocks": blocks}
        session.record(f"{action}_{name}_{in_flight >> 10}k_{blocks}", action, title, seconds, **details)

    for action in ("copy", "read"):
        for name, unroll, blocks in PLAIN:
            kernel(action, name, blocks * unroll * THREADS * 16, blocks, 0)
        for ahead, blocks in AHEAD:
            if (ahead + 1) * STAGE <= device.shared_for(blocks):
                kernel(action, f"ring_{ahead}", blocks * ahead * STAGE, blocks, (ahead + 1) * STAGE)
        for ahead, blocks in AHEAD:
            if device.has_bulk and (ahead + 1) * STAGE + 256 <= device.shared_for(blocks):
                kernel(action, "bulk", blocks * ahead * STAGE, blocks, (ahead + 1) * STAGE + 256, ahead)


def word_sum(values: torch.Tensor) -> int:
    """The sum of a tensor's 32-bit words modulo 2^32."""
    import torch

    words = values.view(torch.int32)
    return sum(int(words[part].sum(dtype=torch.int64)) for part in pieces(len(words), 1 << 28)) % (1 << 32)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, piece by piece: a whole comparison would take as much memory again."""
    import torch

    a, b = one.view(torch.int32), other.view(torch.int32)
    return all(torch.equal(a[part], b[part]) for part in pieces(len(a), 1 << 28))
