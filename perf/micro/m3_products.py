"""M3: does the tensor core add as the simulator's twin does, and do mma and wgmma agree? Decides the twin, and which bits we promise."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from os import environ
from pathlib import Path
from typing import Any

import numpy as np

from perf.micro.device import ROOT
from perf.micro.session import Session, require

TITLE = "M3: sums of 16 products on tensor cores against the simulator's twin, and mma against wgmma"
ROWS, COLS, DEPTH = 64, 8, 16  # of a tile
MODELS = [(depth, extra) for depth in (16, 8, 4) for extra in (2, 1, 0, 3)]  # k in one alignment, extra bits
BOUND = 2.0**-18  # KERNELS.md: |err| <= 2^-18 S


def measure(session: Session) -> None:
    twin = load_twin(ROOT / "build/micro")
    for dtype in ("bf16", "fp16"):
        for kind in ("random", "cancelling", "same_sign"):
            products(session, twin, dtype, kind)


def products(session: Session, twin: Any, dtype: str, kind: str) -> None:
    import torch

    device, tiles = session.device, session.sizes.tiles
    a, b, c = (x.to(device.where) for x in operands(tiles, dtype, kind))
    by_mma, by_wgmma = (torch.full((tiles, ROWS, COLS), float("nan"), device=device.where) for _ in range(2))

    def run() -> None:
        device.launch("multiply", f"products_{dtype}", tiles, 128, a, b, c, by_mma, by_wgmma)

    seconds = device.samples(run, session.sizes.samples)
    found = by_mma.cpu().numpy()
    terms = a.double()[:, :, None] * b.double()[:, None]  # [tiles, rows, cols, k]
    truth, size = terms.sum(-1) + c.double(), terms.abs().sum(-1) + c.double().abs()
    worst = float(((by_mma.double() - truth).abs() / size).max())
    require(worst <= BOUND, f"{dtype} {kind}: relative error {worst:g}")
    shares = {}
    for depth, extra in MODELS:
        expected = by_twin(twin, a.cpu(), b.cpu(), c.cpu(), depth, extra)
        shares[f"k{depth}+{extra}"] = float((found.view(np.uint32) == expected.view(np.uint32)).mean())
    best = max(shares, key=shares.__getitem__)
    details: dict[str, Any] = {"equal_to_twin": shares, "best_twin": best, "max_error": worst}
    if device.has_wgmma:
        other = by_wgmma.cpu().numpy()
        details["wgmma_equal_to_mma"] = float((found.view(np.uint32) == other.view(np.uint32)).mean())
        worst = float(((by_wgmma.double() - truth).abs() / size).max())
        require(worst <= BOUND, f"{dtype} {kind}: relative error of wgmma {worst:g}")
        details["wgmma_max_error"] = worst
    title = f"{dtype}, {kind.replace('_', ' ')}: equal to twin {best}: {shares[best]:.4%}"
    session.record(f"{dtype}_{kind}", "products", title, seconds, products=found.size, **details)
    print("          ", details, flush=True)


def operands(tiles: int, dtype: str, kind: str) -> tuple[Any, Any, Any]:
    """a [tiles, 64, 16], b [tiles, 8, 16] in 16 bits, c [tiles, 64, 8] in float32, fixed by the arguments."""
    import torch

    generator = torch.Generator().manual_seed(len(dtype + kind))
    a, b, c = (torch.randn(tiles, *shape, generator=generator) for shape in ((ROWS, DEPTH), (COLS, DEPTH), (ROWS, COLS)))
    half = DEPTH // 2
    if kind == "same_sign":
        a, b, c = a.abs(), b.abs(), c.abs()
    elif kind == "cancelling":  # the second half takes back the first, but for about 2^-6
        a[..., half:] = a[..., :half]
        b[..., half:] = -b[..., :half] * (1 + 2**-6 * torch.randn(tiles, COLS, half, generator=generator))
        c *= 2**-6
    narrow = torch.bfloat16 if dtype == "bf16" else torch.float16
    return a.to(narrow), b.to(narrow), c


def by_twin(twin: Any, a: Any, b: Any, c: Any, depth: int, extra: int) -> np.ndarray:
    """What the twin makes of the operands: float32 [tiles, 64, 8]."""
    shape = (len(a), ROWS, COLS, DEPTH)
    wide_a = np.ascontiguousarray(np.broadcast_to(a.float().numpy()[:, :, None], shape))
    wide_b = np.ascontiguousarray(np.broadcast_to(b.float().numpy()[:, None], shape))
    start, out = np.ascontiguousarray(c.numpy()), np.empty(shape[:3], np.float32)
    addresses = (x.ctypes.data_as(ctypes.c_void_p) for x in (start, wide_a, wide_b))
    twin.twin_products(ctypes.c_longlong(out.size), *addresses, depth, extra, out.ctypes.data_as(ctypes.c_void_p))
    return out


def load_twin(directory: Path) -> ctypes.CDLL:
    """twin.cpp with the simulator's numbers.cpp, compiled."""
    directory.mkdir(parents=True, exist_ok=True)
    library, simulator = directory / "twin.so", ROOT / "tests/sim"
    sources = [Path(__file__).with_name("twin.cpp"), simulator / "numbers.cpp"]
    compiler = shlex.split(environ.get("CXX", "g++"))
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", f"-I{simulator}"]
    subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
