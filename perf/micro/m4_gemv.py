"""M4: how near to the read bandwidth does a token's y = W x come? Decides the decode kernel's loads, its edge, and its baseline.

Four shapes alone (32 layers' weights in turn) and as the chain of 32 layers, each launch reading what the one before wrote.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perf.micro.device import pointer
from perf.micro.session import Session, require

if TYPE_CHECKING:
    import torch

TITLE = "M4: one token's linears, alone and as a chain of {layers} layers in a CUDA graph; launches that do nothing"
BULK_SHARED = 192_768  # gemv.cu's BulkMemory, without x
NUM_EMPTY = 1000
CHECKED_ROWS = 64


class Gemv(ctypes.Structure):
    """gemv.cu's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "x", "y", "b", "z")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "rank", "num_experts")),
    ]


@dataclass
class Linear:
    """y = W x of one token, with a place for the result."""

    weight: torch.Tensor  # [rows, cols]
    x: torch.Tensor  # [cols]
    y: torch.Tensor  # [rows]
    parts: int = 1


Step = Callable[[Linear], None]


def measure(session: Session) -> None:
    empty_launches(session)
    layers = make_layers(session)
    kinds = ways(session)
    for name, (rows, cols) in session.sizes.shapes.items():
        linears = [layer[name] for layer in layers]
        for way, step in kinds.items():
            run_all(session, f"{name} [{rows}, {cols}]", f"{name}_{way}", way, linears, step)
    chain = [linear for layer in layers for linear in layer.values()]
    for way, step in kinds.items():
        run_all(session, f"chain of {len(layers)} layers", f"chain_{way}", way, chain, step)


def make_layers(session: Session) -> list[dict[str, Linear]]:
    """Each layer's four linears, chained: the next one's x is a part of this one's y."""
    import torch

    sizes, where = session.sizes, session.device.where
    x = torch.randn(sizes.hidden, device=where).to(torch.bfloat16)
    layers = []
    for _ in range(sizes.layers):
        layer = {}
        for name, (rows, cols) in sizes.shapes.items():
            linear = Linear(session.weight(rows, cols), x[:cols], torch.empty(rows, dtype=torch.bfloat16, device=where), sizes.parts[name])
            layer[name], x = linear, linear.y
        layers.append(layer)
    return layers


def ways(session: Session) -> dict[str, Step]:
    """How one linear is computed."""
    import torch

    device = session.device

    def torch_packed(linear: Linear) -> None:  # F.linear of one token, with a given place for the result
        torch.mm(linear.x[None], linear.weight.t(), out=linear.y[None])

    def torch_unpacked(linear: Linear) -> None:
        for weight, y in zip(linear.weight.chunk(linear.parts), linear.y.chunk(linear.parts), strict=True):
            torch.mm(linear.x[None], weight.t(), out=y[None])

    found: dict[str, Step] = {"torch_packed": torch_packed, "torch_unpacked": torch_unpacked}
    for kind in ("plain", "bulk") if device.has_bulk else ("plain",):
        for programmatic in (False, True) if device.has_bulk else (False,):
            found[kind + "_edge" * programmatic] = gemv_step(session, kind, programmatic)
    return found


def gemv_step(session: Session, kind: str, programmatic: bool, adapters: Callable[[Linear], tuple[Any, ...]] | None = None) -> Step:
    """A launch of gemv_plain or gemv_bulk; `adapters` gives a linear's (b, z, rank, experts)."""
    device = session.device

    def step(linear: Linear) -> None:
        rows, cols = linear.weight.shape
        b, z, rank, experts = adapters(linear) if adapters else (None, None, 0, 0)
        params = Gemv(*map(pointer, (linear.weight, linear.x, linear.y, b, z)), rows, cols, rank, experts)
        if kind == "plain":
            device.launch("gemv", "gemv_plain", rows // 16, 256, params, shared_bytes=2 * cols, programmatic=programmatic)
        else:
            grid = min(device.num_multiprocessors, rows // 16)
            device.launch("gemv", "gemv_bulk", grid, 288, params, shared_bytes=BULK_SHARED + 2 * cols, programmatic=programmatic)

    return step


def run_all(session: Session, group: str, name: str, way: str, linears: list[Linear], step: Step) -> None:
    """Time a graph of all the linears and check what it wrote."""

    def run() -> None:
        for linear in linears:
            step(linear)

    replay = session.device.graph(run)
    for linear in linears:
        linear.y.fill_(float("nan"))
    if not name.startswith("chain"):
        for linear in linears:  # nobody has written these inputs
            linear.x.normal_()
    replay()
    for linear in linears:
        check(linear, name)
    nbytes = sum(linear.weight.nbytes for linear in linears)
    seconds = session.device.samples(replay, session.sizes.samples)
    session.record(name, group, way.replace("_", " "), seconds, bytes=nbytes, launches=len(linears))


def check(linear: Linear, name: str, delta: Any = None) -> None:
    """Some rows of y against float64: half an ulp and 2^-16 of the terms' sizes. A library may round partial sums: 2^-7 over all rows."""
    import torch

    rows = torch.linspace(0, len(linear.y) - 1, CHECKED_ROWS, device=linear.y.device).long()
    terms = linear.weight[rows].double() * linear.x.double()
    truth, size = terms.sum(-1), terms.abs().sum(-1)
    if delta is not None:
        truth, size = truth + delta[0][rows], size + delta[1][rows]
    error = (linear.y[rows].double() - truth).abs()
    if "torch" in name:
        require(error.norm() <= 2**-7 * truth.norm(), f"{name}: relative error {float(error.norm() / truth.norm()):g}")
        return
    half_ulp = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=1e-30))) - 8)
    wrong = ~(error <= half_ulp + 2**-16 * size)
    require(not wrong.any(), f"{name}: {int(wrong.sum())} of {CHECKED_ROWS} rows are wrong")


def empty_launches(session: Session) -> None:
    """A thousand kernels that do nothing: what a launch costs inside a graph."""
    device = session.device
    for programmatic in (False, True) if device.has_bulk else (False,):

        def run(programmatic: bool = programmatic) -> None:
            for _ in range(NUM_EMPTY):
                device.launch("gemv", "nothing", 1, 32, programmatic=programmatic)

        seconds = [s / NUM_EMPTY for s in device.samples(device.graph(run), session.sizes.samples)]
        edge = "programmatic edge" if programmatic else "plain launch"
        session.record("empty" + "_edge" * programmatic, "a launch that does nothing, in a graph", edge, seconds)
