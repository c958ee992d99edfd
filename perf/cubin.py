"""What nvcc, ptxas and cuobjdump say of a CUDA source: registers, spills, shared memory, and how many loads may be under way at once.

An instruction's control bits (105-125 of its 128: stall, yield, write and read scoreboard, scoreboards waited for) are read as Jia et al.
found them on Volta (arXiv 1804.06826). NVIDIA documents none of it; tests hold the reading to kernels whose loads are known.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

__all__ = ["INCLUDE", "ROOT", "SITE", "compile_cubin", "find_tool", "functions", "kernels", "loads_in_flight"]

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ROOT / "cuda/include"
SITE = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
SCOREBOARDS = 6
MANY = 64  # a loop that never waits


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in /usr/local/cuda, or of NVIDIA's pip packages."""
    packaged = sorted(SITE.glob(f"cu*/bin/{name}")) + sorted(SITE.glob(f"cuda_*/bin/{name}"))
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or (str(packaged[0]) if packaged else None)


def compile_cubin(nvcc: str, source: Path, arch: str, cubin: Path) -> tuple[Path, str]:
    """(cubin, what ptxas -v reports). Raises RuntimeError for an error or a warning."""
    flags = ["-std=c++17", f"-arch={arch}", "-cubin", f"-I{INCLUDE}", f"-I{ROOT / 'cuda/src'}", "-Xptxas=-v"]
    done = subprocess.run([nvcc, *flags, "-o", str(cubin), str(source)], check=False, capture_output=True, text=True)
    if done.returncode or "warning" in done.stderr:
        raise RuntimeError(done.stderr)
    return cubin, done.stderr


def kernels(report: str) -> dict[str, dict[str, int]]:
    """ptxas -v's figures for each kernel. shared: static; cuobjdump would add the system's 1 KB from sm_90 on."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        figures = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        if not (figures and registers):
            raise RuntimeError(part)
        found[name] = dict(zip(("stack", "stores", "loads"), map(int, figures.groups()), strict=True), registers=int(registers[1]))
        found[name]["shared"] = int(shared[1]) if shared else 0
    return found


def functions(cuobjdump: str, cubin: Path) -> dict[str, str]:
    """The SASS of each kernel."""
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {part.split("\n", 1)[0].strip(): part for part in text.split("Function : ")[1:]}


class Instruction(NamedTuple):
    """One line of SASS, and its second word's control bits."""

    text: str
    next: list[int]  # places of what may follow
    writes: int  # the scoreboard that its result is announced on; 7 = none
    waits: list[int]  # the scoreboards that must be clear before it is issued


def loads_in_flight(sass: str, load: str, after: str) -> int:
    """At most how many loads that match `load` a lane has under way right after one of those that follow `after` in the listing.

    A scoreboard counts loads up and down, and a wait is for zero: for every load that was announced on it, not for one register's. So loads
    that share a scoreboard with one that is waited for are waited for as well. The bound holds on every path: where paths meet, the
    largest count of each scoreboard goes on.
    """
    code = _instructions(sass)
    first = next(i for i, instruction in enumerate(code) if re.search(after, instruction.text))
    counts: list[list[int] | None] = [None] * len(code)
    counts[0] = [0] * SCOREBOARDS
    waiting, most = [0], 0
    while waiting:
        i = waiting.pop()
        instruction, state = code[i], list(counts[i] or [])
        for scoreboard in instruction.waits:
            state[scoreboard] = 0
        if part := re.search(r"DEPBAR\.LE SB(\d), 0x(\w+)", instruction.text):
            state[int(part[1])] = min(state[int(part[1])], int(part[2], 16))
        if re.search(load, instruction.text):
            state[instruction.writes] = min(state[instruction.writes] + 1, MANY)
            most = max(most, sum(state)) if i > first else most
        for follower in instruction.next:
            known = counts[follower]
            joined = state if known is None else [max(pair) for pair in zip(known, state, strict=True)]
            if joined != known:
                counts[follower] = joined
                waiting.append(follower)
    return most


def _instructions(sass: str) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x\w{16} \*/\s+/\* 0x(\w{16}) \*/", sass)
    places = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    found = []
    for i, (_, text, word) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)$", text)
        ends = re.match(r"(BRA(\.U)? 0x|EXIT|RET|BRX|JMP)", text) and not re.match(r"EXIT\.", text)
        follows = [] if ends or i + 1 == len(lines) else [i + 1]
        control = int(word, 16) >> 41
        waits = [s for s in range(SCOREBOARDS) if control >> (11 + s) & 1]
        found.append(Instruction(text, follows + ([places[int(target[1], 16)]] if target else []), control >> 5 & 7, waits))
    return found
