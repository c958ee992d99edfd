"""The accuracy experiment's table and picture, from its results file (perf/accuracy writes it; docs/accuracy.md explains it)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedmerge.commands.tables import markdown_table

__all__ = ["accuracy_markdown", "plot_accuracy"]


def accuracy_markdown(results: Mapping[str, Any]) -> str:
    """The setting, the gate, the criteria and the table of methods, as results say them."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = f"commit {results['git_commit'][:10]}" if results["git_commit"] else "no commit"
    where = f"{results.get('processor') or results['device']}; {versions}"
    lines = [f"{results['setting']['text']}. {where}; {commit}, {results['date'][:10]}."]
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


def plot_accuracy(results: Mapping[str, Any], path: Path) -> None:
    """Left: bits per byte of every seed. Right: which experts each domain uses (lora_switch, first seed)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = results["methods"]
    shares = next((r["shares"] for r in methods.get("lora_switch", {}).get("routers", ()) if r and "shares" in r), None)
    figure = Figure(figsize=(10 if shares else 6, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if shares else 1, squeeze=False, width_ratios=[1.3, 1] if shares else [1])[0]
    shown = [name for name in methods if name != "backbone"]  # far off: it would flatten the rest
    for row, name in enumerate(shown):
        seeds = methods[name]["seeds"]
        axes[0].plot(seeds, [row] * len(seeds), "o", color="#0f766e", markersize=4, alpha=0.6)
        axes[0].plot([statistics.fmean(seeds)] * 2, [row - 0.3, row + 0.3], color="#1f2933", linewidth=1.5)
    axes[0].set_yticks(range(len(shown)), labels=[methods[name].get("title", name) for name in shown], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("test bits per byte (each seed; line: mean)", fontsize=8.5)
    axes[0].set_title(f"{results['suite']}: {results['device']}", loc="left", fontsize=10)
    axes[0].spines[["top", "right"]].set_visible(False)
    if shares:
        image = axes[1].imshow(shares, cmap="Greens", vmin=0, aspect="auto")
        axes[1].set_yticks(range(len(shares)), labels=results["setting"]["domains"], fontsize=8)
        axes[1].set_xticks(range(len(shares[0])))
        axes[1].set_xlabel("expert", fontsize=8.5)
        axes[1].set_title("LoRA-Switch: share of each domain's gates", loc="left", fontsize=10)
        figure.colorbar(image, ax=axes[1])
    figure.savefig(path)
