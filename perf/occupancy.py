"""What the compile reports allow: blocks per multiprocessor, loads in flight, and the bandwidth that they carry. No GPU is asked.

    python -m perf.occupancy [--arch sm_90a ...] [--markdown docs/kernels/occupancy.md]

Kernels are compiled as they are launched (perf/launches.py), with the dynamic shared memory that the planner and the backend give them.

Limits of a multiprocessor, and of its allocations: CUDA C++ Programming Guide 13.1, section 5.1.3, tables 30-31, and cuda_occupancy.h of
CUDA 13.0 (registers by warp in units of 256; shared memory of a block in units of 128 bytes, with 1 KB of the system's).

Bytes in flight follow from the constants in the kernels' headers. Loads into registers are counted in the machine code as well: where its
scoreboards allow fewer than the header intends (cubin.loads_in_flight), those count. By Little's law they carry bytes / latency: an upper
bound, because nothing is added for the time in which loads have arrived and wait to be used. The latencies under load are assumptions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fusedmerge.backend.compiler import ENTRY
from perf import cubin
from perf.launches import MULTIPROCESSORS, Launch, launches

__all__ = ["LIMITS", "Limits", "Resident", "Stream", "build", "compiler", "constants", "main", "page", "resident", "streams", "table"]

DEVICES = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, by their data sheets; MULTIPROCESSORS each, sm_90a
LATENCIES = (0.6, 0.8, 1.0)  # microseconds of a load from memory under load: assumed, M0 (docs/tuning.md) will tell
OCTET = 16  # bytes of a lane's access
PAGE = """# What the compile reports allow

Written by `python -m perf.occupancy --markdown docs/kernels/occupancy.md` with nvcc {compiler}. **Nothing here was measured.** What
follows from it: [tuning](../tuning.md).

- Architectures: registers of a thread, shared memory of a block; the blocks that a multiprocessor holds at once, and what allows no more.
- asked: blocks that the grid has for each of 132 multiprocessors. Llama-2-7B, bf16, top-2 of 8 adapters, r = 64; 1, 16 (`_16`) and 4096
  tokens (`group`, `sgmv`: r = 16, 64 by name; `group_small`: 64); a layer for the switch.
- loads a lane: under way at once, by the constants of the kernel's header and by the scoreboards of its sm_90a machine code (the fewer
  count; one number: `cp.async`, or B and A read by several warps). KB in flight: of a multiprocessor.
- H200 and H100: these bytes, with what is stored for them, over the assumed latency under load, as a share of the data sheet's bandwidth
  (4.8 and 3.35 TB/s). Below 1 the kernel cannot reach that bandwidth; above 1 loads in flight are not what limits it.

{table}
"""


class Limits(NamedTuple):
    """Of a multiprocessor."""

    shared: int  # bytes
    block_shared: int  # bytes that a block may ask for
    threads: int
    blocks: int
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(164 << 10, 163 << 10, 2048, 32),
    "sm_90a": Limits(228 << 10, 227 << 10, 2048, 32),
    "sm_100": Limits(228 << 10, 227 << 10, 2048, 32),
    "sm_120": Limits(100 << 10, 99 << 10, 1536, 24),
}


class Resident(NamedTuple):
    """Blocks of one kernel that a multiprocessor holds at once."""

    blocks: int
    by: str  # what allows no more


def resident(limits: Limits, threads: int, registers: int, shared: int) -> Resident:
    """registers: of a thread; shared: bytes of a block, static and dynamic."""
    warps = -(-threads // 32)
    of_partition = limits.registers // 4 // (-(-registers * 32 // 256) * 256)  # warps: registers belong to one of four schedulers
    allowed = {
        "registers": 4 * of_partition // warps,
        "shared": limits.shared // (-(-(shared + 1024) // 128) * 128) if shared <= limits.block_shared else 0,
        "threads": limits.threads // (32 * warps),
        "blocks": limits.blocks,
    }
    blocks = min(allowed.values())
    return Resident(blocks, ", ".join(name for name, count in allowed.items() if count == blocks))


# ---------------------------------------------------------------------- what is in flight


class Stream(NamedTuple):
    """What a kernel reads from memory."""

    what: str
    loads: int | None  # that a lane has under way by design; None: the machine code alone tells
    bytes: int  # of each
    traffic: int = 1  # bytes moved for each byte that is loaded: what is stored counts, too
    sass: str = ""  # the loads in the machine code, after the first mma; empty: cp.async, which waits for groups, not for scoreboards


def constants(headers: Path = cubin.INCLUDE / "fusedmerge/kernel", **given: int) -> dict[str, int]:
    """Every `constexpr int` of the kernels' headers that follows from others of them, and from the template arguments given."""
    text = "\n".join(path.read_text() for path in sorted(headers.glob("*.cuh")))
    waiting = [(name, value.replace("/", "//")) for name, value in re.findall(r"constexpr int (k\w+) = ([\w\s()+*/?:=]+);", text)]
    found = dict(given)
    for _ in waiting:  # at least one more each time, or none is left
        for name, value in waiting:
            choice = re.fullmatch(r"(.+) \? (.+) : (.+)", value)
            code = "({1}) if ({0}) else ({2})".format(*choice.groups()) if choice else value
            if name not in found and set(re.findall(r"[A-Za-z]\w*", value)) <= set(found):
                found[name] = int(eval(code, {"__builtins__": {}}, found))
    return found


def streams(name: str, headers: Path = cubin.INCLUDE / "fusedmerge/kernel") -> list[Stream]:
    """What this kernel streams; nothing where it is not made for bandwidth."""
    c = constants(headers, kTokenTiles=2 if name.endswith("_16") else 1, kRanks=16 if name.endswith("_16") else 64)
    rows = 2  # of a lane, in a step of the prologue: g and g + 8
    a, x = c["kShrinkSteps"] * 2 * c["kTiles"], c["kShrinkSteps"] * c["kHalves"]  # octets of a lane in the shrink's steps under way
    return {
        "switch, exact": [Stream("base", c["kOctets"], OCTET, 2, r"LDG\.E\.NA\.128")],
        "switch, in place": [Stream("live", c["kOctets"], OCTET, 2, r"LDG\.E\.NA\.128")],
        "switch, fp8 base": [Stream("base", c["kOctets"], OCTET // 2, 3, r"LDG\.E\.NA\.64")],
        "prologue_bf16_8": [Stream("A", rows * c["kUnitSteps"], OCTET)],
        "prologue_bf16_16": [Stream("A", rows * c["kUnitSteps"], OCTET)],
        "gemv_bf16_8": [Stream("W", c["kRowOctets"] * (c["kStages"] - 1), OCTET)],
        "gemv_bf16_16": [Stream("W", c["kRowOctets"] * (c["kStages"] - 1), OCTET)],
        "sgmv_shrink": [
            Stream("A, x", a + x, OCTET, 1, r"LDG\.E\.128"),
            Stream("x, A once", a // c["kWarps"] + x, OCTET),  # a block's warps share an expert: A comes from L1 but for the first
        ],
        "sgmv_expand": [Stream("B", 4 * c["kBlocks"], OCTET // 2), Stream("y", None, OCTET, 2, r"LDG\.E\.NA\.128")],
    }.get(re.sub(r"_bf16_\d+$", "", name) if name.startswith("sgmv") else name, [])


# ---------------------------------------------------------------------- the sheet


class Built(NamedTuple):
    """One kernel on one architecture."""

    launch: Launch
    registers: int
    shared: int  # static and dynamic
    fits: Resident
    sass: str

    def __str__(self) -> str:
        return f"{self.registers} r, {self.shared / 1024:.1f} KB: {self.fits.blocks} ({self.fits.by})"


def build(arch: str) -> list[Built]:
    """Every kernel, compiled. Raises FileNotFoundError where there is no compiler."""
    nvcc, cuobjdump = cubin.find_tool("nvcc"), cubin.find_tool("cuobjdump")
    if not (nvcc and cuobjdump):
        raise FileNotFoundError("nvcc and cuobjdump are needed (pip: nvidia-cuda-nvcc, nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    launched = {f"kernel_{i}": launch for i, launch in enumerate(launches(LIMITS[arch].block_shared))}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernels.cu"
        source.write_text("\n".join(launch.kernel.source().replace(ENTRY, entry) for entry, launch in launched.items()))
        path, report = cubin.compile_cubin(nvcc, source, arch, source.with_suffix(".cubin"))
        figures, sass = cubin.kernels(report), cubin.functions(cuobjdump, path)
    found = []
    for entry, launch in launched.items():
        registers, shared = figures[entry]["registers"], figures[entry]["shared"] + launch.shared
        fits = resident(LIMITS[arch], launch.kernel.threads, registers, shared)
        found.append(Built(launch, registers, shared, fits, sass[entry]))
    return found


def table(architectures: Sequence[str]) -> list[list[str]]:
    """The sheet's rows, its head first. What is in flight is of sm_90a, or else of the first architecture."""
    built = {arch: build(arch) for arch in architectures}
    chosen = "sm_90a" if "sm_90a" in built else architectures[0]
    rates = [(device, latency) for device in DEVICES for latency in LATENCIES] if chosen == "sm_90a" else []
    head = ["kernel", *architectures, "asked", "streamed", "loads a lane: design, compiled", "KB in flight"]
    rows = [[*head, *(f"{device}, {latency} us" for device, latency in rates)]]
    for kernel, *cells in zip(built[chosen], *built.values(), strict=True):
        begin = [kernel.launch.name, *map(str, cells), str(kernel.launch.asked)]
        for flight in [_flight(stream, kernel, rates) for stream in streams(kernel.launch.name)] or [[""] * (3 + len(rates))]:
            rows.append([*begin, *flight])
            begin = [""] * len(begin)
    return rows


def _flight(stream: Stream, kernel: Built, rates: Sequence[tuple[str, float]]) -> list[str]:
    counts = [] if stream.loads is None else [stream.loads]
    counts += [cubin.loads_in_flight(kernel.sass, stream.sass, "HMMA")] if stream.sass else []
    flight = min(counts) * stream.bytes * kernel.launch.kernel.threads * min(kernel.fits.blocks, kernel.launch.asked)
    shares = [flight * stream.traffic / (latency * 1e-6) / (DEVICES[device] / MULTIPROCESSORS) for device, latency in rates]
    loads = f"{stream.loads or '-'}, {min(counts)}" if stream.sass else str(stream.loads)
    return [stream.what, loads, f"{flight / 1024:.3g}", *(f"{share:.2f}" for share in shares)]


def page(architectures: Sequence[str]) -> str:
    """The sheet as Markdown."""
    rows = table(architectures)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return PAGE.format(compiler=compiler(), table="\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]))


def compiler() -> str:
    """nvcc's version."""
    said = subprocess.run([cubin.find_tool("nvcc") or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", said)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the sheet."""
    parser = argparse.ArgumentParser(prog="python -m perf.occupancy", description="What the compile reports allow.")
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--markdown", type=Path, help="write the sheet here as well")
    given = parser.parse_args(arguments)
    text = page(given.arch)
    print(text, end="")
    if given.markdown:
        given.markdown.write_text(text)


if __name__ == "__main__":
    main()
