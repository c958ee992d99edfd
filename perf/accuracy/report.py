"""From runs to statements: paired intervals, the gate, the criteria, what routers did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["conclude", "gate", "interval", "router_figures"]

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
    return {"passed": passed, "text": "routing headroom" if passed else INCONCLUSIVE, "headroom": HEADROOM, **found}


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
    """Of each router's [domains][N] shares: load [N], dead experts (below a tenth of the uniform load), and the mutual information of
    expert and domain in bits. For one shared router also the shares themselves."""
    load, dead, information = {}, 0, []
    for name, rows in shares.items():
        load[name] = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        dead += sum(value < DEAD / len(load[name]) for value in load[name])
        information.append(sum(p / len(rows) * math.log2(p / q) for row in rows for p, q in zip(row, load[name], strict=True) if p > 0))
    found = {
        "load": {name: [round(value, 4) for value in values] for name, values in load.items()},
        "dead_experts": dead,
        "experts": sum(len(values) for values in load.values()),
        "mutual_information_bits": statistics.fmean(information),
    }
    return found | ({"shares": next(iter(shares.values()))} if len(shares) == 1 else {})
