"""M5: what does z = A x in front of a gemv cost, by a plain launch and over a programmatic edge? Decides the hand-over.

A chain of 32 layers of one shape: shrink, then gemv with B z in its epilogue; beside it the chain without adapters.
"""

from __future__ import annotations

import ctypes
import statistics
from typing import Any

from perf.micro.device import pointer
from perf.micro.m4_gemv import Linear, check, gemv_step
from perf.micro.session import Session

TITLE = "M5: shrink and expand of two experts around one token's gemv, {layers} layers in a CUDA graph"
RANKS, EXPERTS = (8, 16, 64), 2
SHAPES = ("o", "gate_up")


class Shrink(ctypes.Structure):
    """gemv.cu's."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "x", "z")), ("cols", ctypes.c_int)]


def measure(session: Session) -> None:
    for name in SHAPES:
        linears = make_chain(session, *session.sizes.shapes[name])
        kinds = [("plain", False), ("plain", True), ("bulk", False), ("bulk", True)] if session.device.has_bulk else [("plain", False)]
        for kind, edge in kinds:
            bare = chain(session, name, kind, edge, linears, 0, 0.0)
            for rank in RANKS:
                chain(session, name, kind, edge, linears, rank, bare)


def make_chain(session: Session, rows: int, cols: int) -> list[Linear]:
    """Layers of [rows, cols]; each reads the first `cols` of what the one before wrote."""
    import torch

    where = session.device.where
    x = torch.randn(cols, device=where).to(torch.bfloat16)
    found = []
    for _ in range(session.sizes.layers):
        found.append(Linear(session.weight(rows, cols), x, torch.empty(rows, dtype=torch.bfloat16, device=where)))
        x = found[-1].y[:cols]
    return found


def chain(session: Session, name: str, kind: str, edge: bool, linears: list[Linear], rank: int, bare: float) -> float:
    """Record one chain; the median in seconds. `bare`: that of the chain without adapters."""
    import torch

    device = session.device
    rows, cols = linears[0].weight.shape
    adapters: dict[int, tuple[Any, ...]] = {}
    for linear in linears if rank else []:
        a, b = session.weight(EXPERTS * rank, cols), session.weight(EXPERTS, rows, rank).mul_(0.1)
        adapters[id(linear)] = (a, b, torch.empty(EXPERTS * rank, device=device.where))

    def of(linear: Linear) -> tuple[Any, ...]:
        _, b, z = adapters[id(linear)]
        return b, z, rank, EXPERTS

    step = gemv_step(session, kind, edge, of if rank else None)

    def run() -> None:
        for linear in linears:
            if rank:
                a, _, z = adapters[id(linear)]
                params = Shrink(*map(pointer, (a, linear.x, z)), cols)
                device.launch("gemv", "shrink", EXPERTS * rank, 256, params, programmatic=edge)
            step(linear)

    replay = device.graph(run)
    for linear in linears:
        linear.y.fill_(float("nan"))
    replay()
    case = f"{name}_{kind}{'_edge' * edge}_r{rank}"
    for linear in linears:
        check(linear, case, delta_of(linear, adapters[id(linear)]) if rank else None)
    seconds = device.samples(replay, session.sizes.samples)
    median = statistics.median(seconds)
    factors = 2 * EXPERTS * rank * (rows + cols)
    nbytes = len(linears) * (2 * rows * cols + factors)
    more: dict[str, Any] = {"bytes": nbytes, "rank": rank}
    if rank:  # what is left of the difference when the factors' bytes are taken out
        more["handover_us"] = 1e6 * ((median - bare) / len(linears) - factors / session.copy_bandwidth)
    title = f"{kind} gemv, {'programmatic edge' if edge else 'plain launch'}, " + (f"r = {rank}" if rank else "no adapters")
    session.record(case, f"{name} [{rows}, {cols}] with {EXPERTS} experts", title, seconds, **more)
    return median


def delta_of(linear: Linear, adapters: tuple[Any, ...]) -> tuple[Any, Any]:
    """B A x in float64, and its terms' sizes."""
    a, b, _ = adapters
    experts, _, rank = b.shape
    factors, x = a.double(), linear.x.double()
    z, size = (factors @ x).view(experts, rank), (factors.abs() @ x.abs()).view(experts, rank)
    return (b.double() @ z[..., None]).sum(0)[:, 0], (b.double().abs() @ size[..., None]).sum(0)[:, 0]
