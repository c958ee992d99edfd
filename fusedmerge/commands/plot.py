"""Pictures and tables: the demo's drift, and what `fusedmerge plot` makes of perf/results. No figure is typed anywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.commands.accuracy import accuracy_markdown, plot_accuracy
from fusedmerge.commands.tables import markdown_table, percent
from fusedmerge.errors import FormatError, MissingFileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["load_results", "plot_decode", "plot_drift", "render_results", "suite_markdown"]

INK, MUTED = "#1f2933", "#7b8794"
COLOURS = ("#c2410c", "#7c6a0a", "#0f766e")
DRIFT = {"peft": "PEFT unmerge + merge", "inplace": "Switcher, inplace", "exact": "Switcher, exact"}
REQUIRED = ("suite", "device", "driver", "versions", "git_commit", "date", "setting", "cases")
REQUIRED_OF_CASE = ("name", "group", "median_ms", "samples_ms")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def plot_drift(found: Mapping[str, Any], path: Path) -> None:
    """Drift over the number of switches on log axes; zeros lie on a line of their own below the axis' break."""
    figure, axes = _figure(7, 4.2)
    values = [v for entry in found["methods"].values() for _, v in entry["drift"] if v]
    floor = min([*values, found["delta"]]) / 10
    for colour, (name, entry) in zip(COLOURS, found["methods"].items(), strict=True):
        counts = [count for count, _ in entry["drift"]]
        drift = [value or floor for _, value in entry["drift"]]
        label = DRIFT[name] + (": 0 at every count" if not any(v for _, v in entry["drift"]) else "")
        axes.loglog(counts, drift, color=colour, marker="o", markersize=4, linewidth=1.8, label=label, clip_on=False)
    axes.axhline(found["delta"], color=MUTED, linewidth=1, linestyle="--")
    axes.text(1, found["delta"] * 1.08, "the mixture's own |delta| / |W|", color=MUTED, fontsize=8, va="bottom")
    axes.axhline(floor * 2.2, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(floor, max([*values, found["delta"]]) * 2)
    ticks = [10.0**e for e in range(-12, 3) if floor * 2.2 < 10.0**e <= axes.get_ylim()[1]]
    axes.set_yticks([floor, *ticks], labels=["0", *(f"$10^{{{round(math.log10(t))}}}$" for t in ticks)])
    axes.minorticks_off()
    axes.set_xlabel("switches, then the mixture taken out", color=INK)
    axes.set_ylabel("|W - W0| / |W0|", color=INK)
    axes.set_title("What switching leaves behind in the weights (bfloat16)", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="center right")
    figure.savefig(path)


def plot_decode(found: Mapping[str, Any], path: Path) -> None:
    """Milliseconds per token of every method and strategy, the reference decoder's above transformers', with lines at the backbones."""
    rows = found["rows"]
    figure, axes = _figure(7, 0.9 + 0.3 * len(rows))
    for index, row in enumerate(rows):
        ours = row["strategy"] in ("merged", "fused")
        colour = MUTED if row["strategy"] == "backbone" else COLOURS[2] if ours else "#c3cbd3"
        axes.barh(index, row["median_ms"], color=colour, height=0.7)
        axes.annotate(f"{row['median_ms']:.2f}", (row["median_ms"], index), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [index for index, row in enumerate(rows) if row["engine"] == engine]
        axes.plot([rows[own[0]]["median_ms"]] * 2, [own[0] - 0.5, own[-1] + 0.5], color=INK, linewidth=0.9, linestyle=":")
    labels = [f"{row['method']}, {row['strategy']}" if row["strategy"] != "backbone" else f"backbone ({row['engine']})" for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"milliseconds per token (median of {found['tokens']}, {found['device']}, batch 1)", color=INK, fontsize=8.5)
    axes.set_title("What dynamic adapters cost a decoded token (dotted: the backbone)", loc="left", color=INK, fontsize=10)
    figure.savefig(path)


# ---------------------------------------------------------------------- perf/results


def load_results(directory: Path) -> list[dict[str, Any]]:
    """All <device>/<suite>.json below `directory`, sorted. Raises MissingFileError if there is none, FormatError for a damaged one."""
    paths = sorted(directory.glob("*/*.json"))
    if not paths:
        raise MissingFileError("plot", "--results", "a directory with <device>/<suite>.json (run `fusedmerge bench`)", str(directory))
    return [_load(path) for path in paths]


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        missing = [name for name in REQUIRED if name not in found]
        for index, case in enumerate(found.get("cases", ())):
            missing += [f"cases[{index}].{name}" for name in REQUIRED_OF_CASE if name not in case]
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError("plot", str(path), "results as perf/ writes them", error) from error
    if missing:
        raise FormatError("plot", str(path), "results as perf/ writes them", f"no {', '.join(missing)}")
    return dict(found)


def render_results(results: Path, docs: Path, readme: Path | None = None) -> list[Path]:
    """Write docs/results.md and docs/img/*.png from all results, and refresh marked blocks of README and docs. Returns what was written.

    A marked block is what lies between `<!-- results: device/suite -->` and `<!-- /results -->`.
    """
    suites = load_results(results)
    (docs / "img").mkdir(parents=True, exist_ok=True)
    written, sections, tables = [], [], {}
    for suite in suites:
        key = f"{suite['device']}/{suite['suite']}"
        picture = docs / "img" / f"{suite['device']}-{suite['suite']}.png"
        accuracy = "methods" in suite
        (plot_accuracy if accuracy else plot_suite)(suite, picture)
        tables[key] = (accuracy_markdown if accuracy else suite_markdown)(suite)
        sections.append(f"## {suite['suite']} on {suite['device']}\n\n{tables[key]}\n\n![{key}](img/{picture.name})")
        written.append(picture)
    page = docs / "results.md"
    page.write_text("# Results\n\nWritten by `fusedmerge plot` from perf/results; do not edit.\n\n" + "\n\n".join(sections) + "\n")
    written.append(page)
    pages = [readme] if readme is not None and readme.is_file() else []
    written += [marked for marked in [*pages, *sorted(docs.glob("*.md"))] if marked != page and _refresh(marked, tables)]
    return written


def _refresh(page: Path, tables: Mapping[str, str]) -> bool:
    """Replace the marked blocks of a page. Raises FormatError for a mark without results."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise FormatError("plot", str(page), f"one of {', '.join(tables)} in a results mark", match[2])
        return f"{match[1]}\n{tables[match[2]]}\n<!-- /results -->"

    old = page.read_text()
    new = re.sub(r"(<!-- results: *(\S+) *-->).*?<!-- /results -->", block, old, flags=re.DOTALL)
    if new != old:
        page.write_text(new)
    return new != old


def suite_markdown(suite: Mapping[str, Any]) -> str:
    """The setting in one sentence, and a table per group of cases."""
    versions = ", ".join(f"{name} {version}" for name, version in suite["versions"].items())
    driver = f", driver {suite['driver']}" if suite["driver"] else ""
    dirty = " with uncommitted changes" if suite.get("git_dirty") else ""
    where = f"{suite.get('processor') or suite['device']}{driver}; {versions}"
    commit = f"commit {suite['git_commit'][:10]}{dirty}" if suite["git_commit"] else "no commit"
    head = f"{suite['setting']['text']}. {where}; {commit}, {suite['date'][:10]}."
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in suite["cases"]:
        groups.setdefault(case["group"], []).append(case)
    return "\n\n".join([head, *(_group_table(name, cases) for name, cases in groups.items())])


def _group_table(name: str, cases: list[Mapping[str, Any]]) -> str:
    """Columns that no case of the group fills are left out."""
    columns: dict[str, list[str]] = {
        "median": [_time(case["median_ms"]) for case in cases],
        f"time / {cases[0].get('compared_to', 'first')}": [_optional(case.get("ratio"), ".2f", "x") for case in cases],
        "GB/s": [_rate(case) for case in cases],
        "of copy": [_optional(case.get("fraction_of_copy"), ".0%") for case in cases],
        "misrounded": [percent(case["error"]["misrounded"]) if case.get("error") else "" for case in cases],
        "max error / bound": [f"{case['error']['of_bound']:.3g}" if case.get("error") else "" for case in cases],
    }
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [[case.get("title", case["name"]), *(cells[index] for cells in kept.values())] for index, case in enumerate(cases)]
    return markdown_table([name, *kept], rows)


def _time(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{1e3 * milliseconds:.2f} us"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def _optional(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _rate(case: Mapping[str, Any]) -> str:
    return f"{case['bytes'] / case['median_ms'] / 1e6:.1f}" if case.get("bytes") else ""


def plot_suite(suite: Mapping[str, Any], path: Path) -> None:
    """The first group's medians as bars, each with the range of its middle 80 % of samples."""
    first = suite["cases"][0]["group"]
    cases = [case for case in suite["cases"] if case["group"] == first]
    figure, axes = _figure(7, 0.9 + 0.45 * len(cases))
    for row, case in enumerate(cases):
        samples = sorted(case["samples_ms"])
        low, high = samples[len(samples) // 10], samples[-1 - len(samples) // 10]
        axes.barh(row, case["median_ms"], color=COLOURS[2] if row == 0 else "#9aa5b1", height=0.62)
        axes.plot([low, high], [row, row], color=INK, linewidth=1)
        end = (max(high, case["median_ms"]), row)
        axes.annotate(_time(case["median_ms"]), end, (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(cases)), labels=[case.get("title", case["name"]) for case in cases], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds (median; line: middle 80 % of samples)", color=INK, fontsize=8.5)
    axes.set_title(f"{first}: {suite['device']}", loc="left", color=INK, fontsize=10)
    figure.savefig(path)
