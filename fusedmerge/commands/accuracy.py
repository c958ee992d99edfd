"""The accuracy experiment's table and picture, from its results file (perf/accuracy writes it; docs/accuracy.md explains it)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedmerge.commands.plot_pictures import COLOURS, INK, MUTED, dress, figure_of
from fusedmerge.commands.plot_tables import head_markdown
from fusedmerge.commands.tables import markdown_table

__all__ = ["accuracy_markdown", "accuracy_pictures"]


def accuracy_markdown(results: Mapping[str, Any], methods: bool = True) -> str:
    """The setting, the gate, the criteria and (where asked for) the table of methods, as results say them."""
    lines = [head_markdown(results)]
    lines += [f"Notice: {notice}." for notice in results["notices"]]
    if results.get("gate"):
        judged = results["gate"]
        lines.append(
            f"Gate (the oracle must beat LoRA of equal total parameters by {judged['headroom']:g} paired sd): **{judged['text']}**, "
            f"difference {_signed(judged)}, sd {judged['sd']:.4f}."
        )
    if results.get("criteria"):
        rows = []
        for judged in results["criteria"].values():
            margin = f" (margin ±{judged['margin']:.4f})" if "margin" in judged else ""
            rows.append([judged["text"] + margin, " - ".join(judged["of"]), _signed(judged), "yes" if judged["holds"] else "**no**"])
        lines.append(markdown_table(["stated beforehand", "difference", "bits per byte, 95 % interval", "holds"], rows))
    if methods:
        lines.append(_methods_table(results["methods"]))
    return "\n\n".join(lines)


def _signed(judged: Mapping[str, Any]) -> str:
    low, high = judged["interval"]
    return f"{judged['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _methods_table(methods: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in methods.items():
        seeds = entry["seeds"]
        spread = f" ± {statistics.stdev(seeds):.4f}" if len(seeds) > 1 else ""
        routers = [found for found in entry.get("routers", ()) if found]
        dead = f"{statistics.fmean(r['dead_experts'] for r in routers):.1f} of {routers[0]['experts']}" if routers else ""
        bits = f"{statistics.fmean(r['mutual_information_bits'] for r in routers):.2f}" if routers else ""
        cells = [entry.get("title", name), f"{statistics.fmean(seeds):.4f}{spread}", " ".join(f"{v:.3f}" for v in seeds)]
        cells.append(_beside(seeds, methods.get("lora_switch", {}).get("seeds", ())))
        cells += [f"{entry['params']:,}", entry.get("r") or "", f"{entry['lr']:g}" if entry.get("lr") else "", bits, dead]
        rows.append([*cells, f"{statistics.fmean(entry['cpu_seconds']):.0f}" if entry.get("cpu_seconds") else ""])
    header = ["method", "bits per byte (mean ± sd)", "seeds", "minus LoRA-Switch", "trainable", "r", "lr"]
    return markdown_table([*header, "I(expert; domain), bits", "dead experts", "CPU s"], rows)


def _beside(seeds: Sequence[float], reference: Sequence[float]) -> str:
    """The paired difference, mean ± sd; nothing beside itself."""
    if len(seeds) != len(reference) or len(seeds) < 2 or list(seeds) == list(reference):
        return ""
    differences = [a - b for a, b in zip(seeds, reference, strict=True)]
    return f"{statistics.fmean(differences):+.4f} ± {statistics.stdev(differences):.4f}"


def accuracy_pictures(results: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Draw <directory>/<device>-<suite>-seeds.png, and -experts.png where LoRA-Switch was run: {kind: path}."""
    drawn = {kind: directory / f"{results['device']}-{results['suite']}-{kind}.png" for kind in ("seeds", "experts")}
    methods = results["methods"]
    _plot_seeds(methods, drawn["seeds"])
    shares = next((found["shares"] for found in methods.get("lora_switch", {}).get("routers", ()) if found), None)
    if shares is None:
        del drawn["experts"]
    else:
        _plot_experts(shares, results["setting"]["domains"], drawn["experts"])
    return drawn


def _plot_seeds(methods: Mapping[str, Any], path: Path) -> None:
    """Every seed's bits per byte, less LoRA-Switch's on the same seed where there is one. The backbone is left out: it is far off."""
    reference = methods.get("lora_switch", {}).get("seeds")
    shown = {name: entry for name, entry in methods.items() if name not in ("backbone", "lora_switch")}
    figure = figure_of(7, 0.9 + 0.35 * len(shown))
    axes = figure.add_subplot()
    for row, entry in enumerate(shown.values()):
        values = [seed - other for seed, other in zip(entry["seeds"], reference, strict=True)] if reference else entry["seeds"]
        axes.plot(values, [row] * len(values), "o", color=COLOURS[2], markersize=4, alpha=0.6)
        axes.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.5)
    if reference:
        axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(shown)), labels=[entry.get("title", name) for name, entry in shown.items()])
    axes.invert_yaxis()
    dress(axes, "", "bits per byte, less LoRA-Switch's on the same seed (line: mean)" if reference else "bits per byte (line: mean)")
    figure.savefig(path)


def _plot_experts(shares: Sequence[Sequence[float]], domains: Sequence[str], path: Path) -> None:
    """Each domain's gates by expert."""
    figure = figure_of(5, 0.9 + 0.3 * len(shares))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Greens", vmin=0, aspect="auto")
    axes.set_yticks(range(len(shares)), labels=list(domains))
    axes.set_xticks(range(len(shares[0])))
    dress(axes, "LoRA-Switch: share of each domain's gates, first seed", "expert")
    figure.colorbar(image, ax=axes)
    figure.savefig(path)
