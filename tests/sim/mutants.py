"""Mutation test of the kernels' synchronisation: `python tests/sim/mutants.py [--jobs 2] [--only TEXT] [--list]`.

Each mutant is the kernel sources with one barrier, one wait or one commit removed, or with one step of the selection's protocol broken.
It is compiled into its own simulator library and the suite runs against it until a test fails: the mutant is caught. Ends with status 1
where one survives. Fences and memory order are not modelled by the simulator; no mutant removes one (docs/kernels/switch.md lists them).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build

KERNELS = "cuda/include/fusedmerge/kernel"
REMOVABLE = re.compile(r"^\s*(block_barrier\(\)|warp_barrier\(\)|grid_wait\(\)|copy_async_wait<[^>]*>\(\)|copy_async_commit\(\));")
UNTESTED = (2, 3, 4, 5)  # pytest's own: collection failed, internal error, usage, no tests
UNMUTATED = {"platform.cuh", "ptx.cuh"}  # definitions, not uses
# A barrier that the simulator cannot miss: its lanes meet in the shuffles and products that follow, which on a GPU order no memory.
UNSEEN = {"warp_barrier();  // what other lanes did to the sums is done"}


@dataclass(frozen=True)
class Family:
    suites: tuple[str, ...]  # that must catch its mutants
    unit: str  # that its kernels are compiled into


SWITCH = Family(("tests/test_sim_switch.py",), "interface")
LINEAR = Family(("tests/test_sim_linear.py", "tests/test_linear.py"), "kernels_linear")
LINEAR_FILES = ("route.cuh", "products.cuh", "source.cuh", "prologue.cuh", "expand.cuh", "gemv.cuh", "lora_linear.cuh")
SGMV = Family(("tests/test_sim_group.py", "tests/test_sim_sgmv.py"), "kernels_sgmv")
SGMV_FILES = ("group.cuh", "sgmv_split.cuh", "sgmv_shrink.cuh", "sgmv_expand.cuh", "sgmv.cuh")
FAMILIES = dict.fromkeys(LINEAR_FILES, LINEAR) | dict.fromkeys(SGMV_FILES, SGMV)  # the other files: SWITCH

# (file, text, replacement, what it breaks)
PROTOCOL = [
    ("selection.cuh", "!= grid_size() - 1) return;", "!= 0) return;", "the first block updates the last selection, not the last one"),
    ("selection.cuh", "    state.ticket = 0;\n", "", "the ticket is never reset"),
    ("selection.cuh", "    state.num_last = memory.next.count;\n", "", "the last selection's length is not remembered"),
    ("selection.cuh", "    state.valid = 1;\n", "", "the state never becomes valid"),
    ("selection.cuh", "if (bad_id || bad_gate) {", "if (false) {", "an invalid selection is applied"),
    ("selection.cuh", "if (!block_any(differs)) return false;", "block_any(differs);", "an unchanged selection is applied again"),
    ("switch.cuh", "finish_selection(selection, params);", "", "nobody takes a ticket"),
    ("switch_mma.cuh", "if (ratio != 1.0f) rescale(ratio);", "", "experts share one coefficient"),
    ("products.cuh", "multiply_accumulate(acc[i][n]", "multiply_accumulate(acc[0][n]", "a warp adds in one chain, not two"),
    ("prologue.cuh", "const int routing = i / params.num_adapters;", "const int routing = 0;", "all logits are the first router's"),
    ("products.cuh", "++routing;", "routing = 0;", "every choice is the first routing's"),
    ("expand.cuh", "target.routing * params.num_slots", "0", "every target's tokens take the first routing's adapters"),
    ("gemv.cuh", "bits |= 1 <<", "bits = 1 <<", "a block chooses for its last tile alone"),
    (
        "gemv.cuh",
        "block_index() == 0 || params.num_routings == 1",
        "params.num_routings == 1",
        "nobody hands out the routings of other blocks' tiles",
    ),
    ("gemv.cuh", "(again, stage)", "(walk, stage)", "the ring starts with x of other steps"),
    ("gemv.cuh", "stage == 0 ? kStages - 1 : stage - 1", "stage", "a step is fetched into another step's stage"),
    ("group.cuh", "if (ids[i] == id) return 0.0f;", "", "a token's equal ids are pairs of their own"),
    ("group.cuh", "before + count_bits(equal);", "before + 1;", "lanes with one index count once"),
    ("group.cuh", "before + lower;", "before;", "lanes with one index have one place"),
    ("group.cuh", "if (second == kNoExpert) second = lowest;", "", "a token with one expert has a bucket that does not exist"),
    ("group.cuh", "(same && other < i)", "false", "an expert's pairs share one place in a tile"),
    ("group.cuh", "start.pair + before.pairs", "start.pair", "every chunk's pairs begin at the expert's first place"),
    ("group.cuh", "const int begin = i / tile_slots * tile_slots;", "const int begin = 0;", "the tiles of a block are one"),
    ("sgmv_shrink.cuh", "const bool split = params.num_parts > 1;", "const bool split = false;", "every part is the sum of all"),
    ("sgmv_shrink.cuh", "clear(chain);", "", "a part begins with the one before"),
    ("sgmv_split.cuh", "127 + 14 + 127 - exponent < 253 ? 127 + 14 + 127 - exponent : 253;", "127;", "z leaves the range of fp16"),
    ("sgmv_split.cuh", "gate != 0.0f ? multiply(gate, z) : 0.0f", "z", "every gate is 1"),
    (
        "sgmv_shrink.cuh",
        "for (int mask = 4; mask < kWarpLanes; mask *= 2) size",
        "const int mask = 4; size",
        "a lane chooses its own power of two",
    ),
    (
        "sgmv_shrink.cuh",
        "for (int mask = 1; mask < num_lanes; mask *= 2) size",
        "const int mask = 1; size",
        "the same, where z is in parts",
    ),
    ("sgmv_expand.cuh", "add(product[c % 2], product[2 + c % 2])", "product[c % 2]", "z has 16 bits"),
    ("sgmv_expand.cuh", "from, num_ranks - 16 * block);", "from, 4);", "ranks that do not exist are read"),
    ("sgmv_expand.cuh", "first_rank == 0 && operands.row < 0;", "operands.row < 0;", "every 64 ranks begin the sums"),
    ("sgmv_expand.cuh", "first_rank == 0 && operands.row < 0;", "false;", "no expert begins the sums"),
    ("sgmv_expand.cuh", "if (rank <= 0) begin(place, count);", "", "one without ranks does not"),
    ("sgmv_expand.cuh", "if (scaling == 0.0f) {", "if (false) {", "factors of an adapter whose scaling is 0 are used"),
]


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    title: str
    text: str  # the whole mutated file


def mutants() -> Iterator[Mutant]:
    for path in sorted((build.ROOT / KERNELS).glob("*.cuh")):
        if path.name in UNMUTATED:
            continue
        lines = path.read_text().splitlines(keepends=True)
        for i, line in enumerate(lines):
            if "block_any(" in line:
                alone = [*lines[:i], line.replace("block_any(", "bool("), *lines[i + 1 :]]
                yield Mutant(path.name, i + 1, f"each thread alone in {line.strip()}", "".join(alone))
            if REMOVABLE.match(line) and line.strip() not in UNSEEN:
                yield Mutant(path.name, i + 1, f"without {line.strip()}", "".join([*lines[:i], "\n", *lines[i + 1 :]]))
    for file, old, new, title in PROTOCOL:
        text = (build.ROOT / KERNELS / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"mutants: {file}: expected {old!r} once, got {text.count(old)} times")
        yield Mutant(file, text[: text.index(old)].count("\n") + 1, title, text.replace(old, new))


def run(mutant: Mutant, place: Path, snapshot: Path, objects: dict[str, Path]) -> str | None:
    """The first test that fails, or None."""
    root = place / "root"
    shutil.copytree(snapshot, root)
    (root / KERNELS / mutant.file).write_text(mutant.text)
    others = {unit: path for unit, path in objects.items() if unit != family(mutant.file).unit}
    library = build.compile_library(place / "mutant.so", root, ["-Wno-unused"], others)
    suites = [str(root / suite) for suite in family(mutant.file).suites]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-k", "not ptx", *suites]
    try:
        environment = {**os.environ, "FUSEDMERGE_SIM_LIB": str(library)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    except subprocess.TimeoutExpired:
        return "(did not end)"
    if done.returncode in UNTESTED or re.search(r"^ERROR ", done.stdout, re.MULTILINE):  # an error outside a test catches nothing
        raise RuntimeError(f"mutants: the suite did not run:\n{done.stdout}")
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else None if done.returncode == 0 else f"(pytest ended with {done.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose description contains this text")
    parser.add_argument("--list", action="store_true", help="list them and stop")
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if arguments.only in f"{m.file}:{m.line} {m.title}"]
    if arguments.list:
        print("\n".join(f"{m.file}:{m.line} {m.title}" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        snapshot = Path(scratch) / "snapshot"  # so that edits made meanwhile change nothing
        for folder in ("cuda", "tests/sim"):
            shutil.copytree(build.ROOT / folder, snapshot / folder)
        for file in (*SWITCH.suites, *LINEAR.suites, *SGMV.suites, "tests/conftest.py"):
            shutil.copy(build.ROOT / file, snapshot / file)
        objects = compile_units(Path(scratch))

        def judge(item: tuple[int, Mutant]) -> bool:
            place = Path(scratch) / str(item[0])
            place.mkdir()
            failed = run(item[1], place, snapshot, objects)
            print(f"{'caught' if failed else 'SURVIVED':9} {item[1].file}:{item[1].line} {item[1].title}  [{failed or ''}]", flush=True)
            return failed is not None

        caught = list(pool.map(judge, enumerate(chosen)))
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    return 0 if all(caught) else 1


def family(file: str) -> Family:
    return FAMILIES.get(file, SWITCH)


def compile_units(scratch: Path) -> dict[str, Path]:
    """Objects of the sources as they are: a mutant needs only its own family's anew."""
    objects = {}
    stated = f'-DFUSEDMERGE_VERSION="{build.version()}"'
    for unit in build.UNITS:
        objects[unit.stem] = scratch / f"{unit.stem}.o"
        includes = [f"-I{build.ROOT / folder}" for folder in ("cuda/include", "cuda/src", "tests/sim")]
        subprocess.run(["g++", *build.FLAGS, stated, *includes, "-xc++", "-c", str(unit), "-o", str(objects[unit.stem])], check=True)
    return objects


if __name__ == "__main__":
    sys.exit(main())
