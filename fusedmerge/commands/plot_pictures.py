"""Pictures: latency bars, scaling curves, the roofline and drift of a results file, and the demo's drift and decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedmerge.commands.plot_tables import groups_of, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_decode", "plot_drift", "suite_pictures"]

INK, MUTED, PALE = "#1f2933", "#7b8794", "#9aa5b1"
COLOURS = ("#c2410c", "#7c6a0a", "#0f766e", "#1d4ed8", "#86198f", "#4d7c0f")
DRIFT = {"peft": "PEFT unmerge + merge", "inplace": "Switcher, inplace", "exact": "Switcher, exact"}
Case = Mapping[str, Any]


def suite_pictures(suite: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Draw what a suite has cases for, as <directory>/<device>-<suite>-<kind>.png: {kind: path}."""
    groups = groups_of(suite)
    drift = [case for cases in groups.values() for case in cases if "drift" in case]
    curves = {name: cases for name, cases in groups.items() if all("x" in case for case in cases)}
    bars = {name: cases for name, cases in groups.items() if name not in curves and not any("drift" in case for case in cases)}
    ceilings = suite["setting"].get("ceilings")
    roofed = {name: [case for case in cases if case.get("flops") and case.get("bytes")] for name, cases in bars.items()}
    roofed = {name: cases for name, cases in roofed.items() if cases and ceilings}

    def path(kind: str) -> Path:
        return directory / f"{suite['device']}-{suite['suite']}-{kind}.png"

    drawn = {}
    for kind, found in (("bars", bars), ("curves", curves), ("roofline", roofed), ("drift", drift)):
        if found:
            drawn[kind] = path(kind)
    if bars:
        _plot_bars(bars, suite["device"], drawn["bars"])
    if curves:
        _plot_curves(curves, suite["device"], drawn["curves"])
    if roofed:
        _plot_roofline(roofed, ceilings, suite["device"], drawn["roofline"])
    if drift:
        plot_drift({"methods": {case["name"]: case for case in drift}, "delta": drift[0]["delta"]}, drawn["drift"])
    return drawn


def figure_of(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(x, color=INK, fontsize=8.5)
    axes.set_ylabel(y, color=INK, fontsize=8.5)


def _middle(samples: Sequence[float]) -> tuple[float, float]:
    """The range of the middle 80 % of samples."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def _plot_bars(groups: Mapping[str, Sequence[Case]], device: str, path: Path) -> None:
    """A panel per group; medians as bars, the middle 80 % of samples as a line, the prediction as a tick."""
    rows = [len(cases) for cases in groups.values()]
    figure = figure_of(8, 0.8 * len(rows) + 0.34 * sum(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": [count + 1.2 for count in rows]})[:, 0]
    for axes, (name, cases) in zip(panels, groups.items(), strict=True):
        for row, case in enumerate(cases):
            low, high = _middle(case["samples_ms"])
            axes.barh(row, case["median_ms"], color=COLOURS[2] if row == 0 else PALE, height=0.62)
            axes.plot([low, high], [row, row], color=INK, linewidth=1)
            predicted = case.get("predicted_ms")
            if predicted:
                axes.plot([predicted] * 2, [row - 0.42, row + 0.42], color=COLOURS[0], linewidth=1.6)
            end = (max(high, case["median_ms"], predicted or 0.0), row)
            axes.annotate(time_text(case["median_ms"]), end, (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(cases)), labels=[case["title"] for case in cases])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        tick = "; red: predicted" if any(case.get("predicted_ms") for case in cases) else ""
        dress(axes, f"{name}: {device}", f"milliseconds (median; line: middle 80 % of samples{tick})")
    figure.savefig(path)


def _plot_curves(groups: Mapping[str, Sequence[Case]], device: str, path: Path) -> None:
    """A panel per group; each series measured (points) and predicted (dashes)."""
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = figure_of(3.6 * columns, 3.1 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, (name, cases) in zip(panels, groups.items(), strict=False):
        series = dict.fromkeys(case["series"] for case in cases)
        for colour, label in zip((COLOURS[2], PALE, *COLOURS[3:]), series, strict=False):
            points = sorted((case for case in cases if case["series"] == label), key=lambda case: float(case["x"]))
            x = [case["x"] for case in points]
            median = [case["median_ms"] for case in points]
            ranges = [_middle(case["samples_ms"]) for case in points]
            around = [[m - min(low, m) for m, (low, _) in zip(median, ranges, strict=True)]]
            around.append([max(high, m) - m for m, (_, high) in zip(median, ranges, strict=True)])
            axes.errorbar(x, median, around, color=colour, marker="o", markersize=3.5, linewidth=1.4, elinewidth=0.8, label=label)
            if all(case.get("predicted_ms") for case in points):
                axes.plot(
                    x, [case["predicted_ms"] for case in points], color=colour, linestyle="--", linewidth=1, label=f"{label}, predicted"
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([case["x"] for case in cases], labels=[f"{case['x']:.3g}" for case in cases])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7)
        dress(axes, name, cases[0]["axis"], f"milliseconds ({device})")
    figure.savefig(path)


def _plot_roofline(groups: Mapping[str, Sequence[Case]], ceilings: Mapping[str, float], device: str, path: Path) -> None:
    """FLOP/s over FLOP per byte: the cases between the measured copy rate (the slope) and the measured GEMM rates (the ceilings)."""
    figure = figure_of(7.5, 4.6)
    axes = figure.subplots()
    every = [case for cases in groups.values() for case in cases]
    intensity = [case["flops"] / case["bytes"] for case in every]
    low, high = min(intensity) / 4, max(*intensity, ceilings["flops"] / ceilings["copy"]) * 2
    for name, label, style in (("flops", "bfloat16 GEMM", "-"), ("flops_float32", "float32 GEMM", "--")):
        ridge = ceilings[name] / ceilings["copy"]
        axes.loglog(
            [low, ridge, high], [low * ceilings["copy"] / 1e9, *[ceilings[name] / 1e9] * 2], color=MUTED, linestyle=style, linewidth=1
        )
        axes.text(high, ceilings[name] / 1e9, f"{label}: {ceilings[name] / 1e9:.4g}", ha="right", va="bottom", fontsize=7.5, color=MUTED)
    axes.text(
        low, low * ceilings["copy"] / 1e9, f"   copy: {ceilings['copy'] / 1e9:.4g} GB/s", fontsize=7.5, color=MUTED, va="top", ha="left"
    )  # fmt: skip
    markers = "osD^vPX*<>"
    first, *others = groups.items()
    for index, case in enumerate(first[1]):
        place = case["flops"] / case["bytes"], case["flops"] / case["median_ms"] / 1e6
        colour = COLOURS[2] if index == 0 else INK
        axes.plot(*place, markers[index % len(markers)], color=colour, markersize=6, linestyle="none", label=case["title"])
    for colour, (name, cases) in zip(COLOURS[3:] + COLOURS[:2], others, strict=False):
        x = [case["flops"] / case["bytes"] for case in cases]
        axes.plot(
            x, [case["flops"] / case["median_ms"] / 1e6 for case in cases], ".", color=colour, markersize=5, linestyle="none", label=name
        )
    axes.set_ylim(10.0 ** math.floor(math.log10(low * ceilings["copy"] / 1e9)), 10.0 ** math.ceil(math.log10(ceilings["flops"] / 1e9)))
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")
    dress(axes, f"Roofline: {device}", "FLOP per byte of the way's own traffic", "GFLOP/s")
    figure.savefig(path)


def plot_drift(found: Mapping[str, Any], path: Path) -> None:
    """Drift over the number of switches on log axes; zeros lie on a line of their own below the axis' break.

    found: {"methods": {name: {"drift": [[switches, |W - W0| / |W0|], ...]}}, "delta": the mixture's own |delta| / |W|}.
    """
    figure = figure_of(7, 4.2)
    axes = figure.subplots()
    values = [v for entry in found["methods"].values() for _, v in entry["drift"] if v]
    floor = min([*values, found["delta"]]) / 10
    for colour, (name, entry) in zip(COLOURS, found["methods"].items(), strict=False):
        counts = [count for count, _ in entry["drift"]]
        drift = [value or floor for _, value in entry["drift"]]
        label = DRIFT.get(name, name) + (": 0 at every count" if not any(v for _, v in entry["drift"]) else "")
        axes.loglog(counts, drift, color=colour, marker="o", markersize=4, linewidth=1.8, label=label, clip_on=False)
    axes.axhline(found["delta"], color=MUTED, linewidth=1, linestyle="--")
    axes.text(1, found["delta"] * 1.08, "the mixture's own |delta| / |W|", color=MUTED, fontsize=8, va="bottom")
    axes.axhline(floor * 2.2, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(floor, max([*values, found["delta"]]) * 2)
    ticks = [10.0**e for e in range(-12, 3) if floor * 2.2 < 10.0**e <= axes.get_ylim()[1]]
    axes.set_yticks([floor, *ticks], labels=["0", *(f"$10^{{{round(math.log10(t))}}}$" for t in ticks)])
    axes.minorticks_off()
    dress(axes, "What switching leaves behind in the weights (bfloat16)", "switches, then the mixture taken out", "|W - W0| / |W0|")
    axes.legend(frameon=False, fontsize=8.5, loc="center right")
    figure.savefig(path)


def plot_decode(found: Mapping[str, Any], path: Path) -> None:
    """Milliseconds per token of every method and strategy, the reference decoder's above transformers', with lines at the backbones."""
    rows = found["rows"]
    figure = figure_of(7.5, 0.9 + 0.3 * len(rows))
    axes = figure.subplots()
    for index, row in enumerate(rows):
        ours = row["strategy"] in ("merged", "fused")
        colour = MUTED if row["strategy"] == "backbone" else COLOURS[2] if ours else PALE
        axes.barh(index, row["median_ms"], color=colour, height=0.7)
        axes.annotate(f"{row['median_ms']:.2f}", (row["median_ms"], index), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [index for index, row in enumerate(rows) if row["engine"] == engine]
        axes.plot([rows[own[0]]["median_ms"]] * 2, [own[0] - 0.5, own[-1] + 0.5], color=INK, linewidth=0.9, linestyle=":")
    labels = [f"{row['method']}, {row['strategy']}" if row["strategy"] != "backbone" else f"backbone ({row['engine']})" for row in rows]
    axes.set_yticks(range(len(rows)), labels=labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    where = f"milliseconds per token (median of {found['tokens']}, {found['device']}, batch 1)"
    dress(axes, "What dynamic adapters cost a decoded token (dotted: the backbone)", where)
    figure.savefig(path)
