"""From runs to statements: paired intervals, the gate, the criteria, and the table and picture for docs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedmerge.commands.tables import markdown_table

__all__ = ["accuracy_markdown", "accuracy_plot", "conclude", "gate", "interval", "router_figures"]

# Student's t, 97.5 %, by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}
AS_ACCURATE = 0.05  # of what adaptation gains: backbone - lora_equal_active
HEADROOM = 2.0  # paired standard deviations
INCONCLUSIVE = "inconclusive: no routing headroom"
DEAD = 0.1  # of the uniform load

# Stated before anything was run: (name, statement, minuend, subtrahend). A difference below 0 means that the first needs fewer bits.
CRITERIA = (
    ("as_accurate", f"as accurate as MoLA: within ±{AS_ACCURATE:.0%} of (backbone - LoRA of equal active rank)", "lora_switch", "mola"),
    ("router_learns", "the router learns: fewer bits than a random table", "lora_switch", "random_table"),
    ("better_than_lora_equal_active", "better than one LoRA of equal active rank", "lora_switch", "lora_equal_active"),
    ("better_than_lora_equal_total", "better than one LoRA of equal total parameters", "lora_switch", "lora_equal_total"),
)


def interval(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """The paired difference first - second: its mean, standard deviation, and 95 % t-interval."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    half = T975[len(differences) - 1] * sd / math.sqrt(len(differences))
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half]}


def gate(oracle: Sequence[float], lora_equal_total: Sequence[float]) -> dict[str, Any]:
    """Is there anything that routing could win? The oracle must beat LoRA of equal total parameters by 2 paired standard deviations."""
    found = interval(oracle, lora_equal_total)
    passed = found["mean"] < -HEADROOM * found["sd"]
    return {"passed": passed, "text": "routing headroom" if passed else INCONCLUSIVE, **found}


def conclude(seeds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Every criterion with its interval, and whether it holds. seeds: method -> bits per byte."""
    gain = statistics.fmean(seeds["backbone"]) - statistics.fmean(seeds["lora_equal_active"])
    found = {}
    for name, text, first, second in CRITERIA:
        judged = interval(seeds[first], seeds[second])
        low, high = judged["interval"]
        holds = -AS_ACCURATE * gain <= low and high <= AS_ACCURATE * gain if name == "as_accurate" else high < 0
        found[name] = {"text": text, "of": [first, second], "holds": holds, **judged}
    found["as_accurate"]["margin"] = AS_ACCURATE * gain
    return found


def router_figures(shares: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Of each router's [domains][N] shares: load [N], dead experts (below a tenth of the uniform load), and the mutual information of expert
    and domain in bits. For one shared router also the shares themselves."""
    load, dead, information = {}, 0, []
    for name, rows in shares.items():
        load[name] = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        dead += sum(value < DEAD / len(load[name]) for value in load[name])
        information.append(
            sum(p / len(rows) * math.log2(p / q) for row in rows for p, q in zip(row, load[name], strict=True) if p > 0)
        )
    found = {
        "load": {name: [round(value, 4) for value in values] for name, values in load.items()},
        "dead_experts": dead,
        "experts": sum(len(values) for values in load.values()),
        "mutual_information_bits": statistics.fmean(information),
    }
    return found | ({"shares": next(iter(shares.values()))} if len(shares) == 1 else {})


def accuracy_markdown(results: Mapping[str, Any]) -> str:
    """The setting, the gate, the criteria and the table of methods, as results say them."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = f"commit {results['git_commit'][:10]}" if results["git_commit"] else "no commit"
    lines = [f"{results['setting']['text']}. {results.get('processor') or results['device']}; {versions}; {commit}, {results['date'][:10]}."]
    lines += [f"Notice: {notice}." for notice in results["notices"]]
    if results.get("gate"):
        judged = results["gate"]
        lines.append(
            f"Gate (the oracle must beat LoRA of equal total parameters by {HEADROOM:g} paired sd): **{judged['text']}**, "
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
        rows.append(
            [
                entry.get("title", name), f"{statistics.fmean(seeds):.4f}{spread}", " ".join(f"{v:.3f}" for v in seeds), f"{entry['params']:,}",
                entry.get("r") or "", f"{entry['lr']:g}" if entry.get("lr") else "", bits, dead,
                f"{statistics.fmean(entry['cpu_seconds']):.0f}" if entry.get("cpu_seconds") else "",
            ]  # fmt: skip
        )
    header = ["method", "bits per byte (mean ± sd)", "seeds", "trainable", "r", "lr", "I(expert; domain), bits", "dead experts", "CPU s"]
    return markdown_table(header, rows)


def accuracy_plot(results: Mapping[str, Any], path: Path) -> None:
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
