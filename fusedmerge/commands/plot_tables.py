"""The markdown of a results file: the setting in a sentence, and a table per group of cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedmerge.commands.tables import markdown_table, percent

__all__ = ["group_markdown", "groups_of", "head_markdown", "suite_markdown", "time_text"]

Case = Mapping[str, Any]


def suite_markdown(suite: Mapping[str, Any]) -> str:
    """The head, the measured ceilings, and every group."""
    parts = [head_markdown(suite), _ceilings(suite["setting"].get("ceilings"))]
    return "\n\n".join(part for part in (*parts, *(group_markdown(*group) for group in groups_of(suite).items())) if part)


def groups_of(suite: Mapping[str, Any]) -> dict[str, list[Case]]:
    """A suite's cases by group, in the order of their first cases."""
    groups: dict[str, list[Case]] = {}
    for case in suite["cases"]:
        groups.setdefault(case["group"], []).append(case)
    return groups


def head_markdown(suite: Mapping[str, Any]) -> str:
    """What was measured, on what, with which versions, by which commit."""
    versions = ", ".join(f"{name} {version}" for name, version in suite["versions"].items())
    driver = f", driver {suite['driver']}" if suite["driver"] else ""
    dirty = " with uncommitted changes" if suite.get("git_dirty") else ""
    where = f"{suite.get('processor') or suite['device']}{driver}; {versions}"
    commit = f"commit {suite['git_commit'][:10]}{dirty}" if suite["git_commit"] else "no commit"
    return f"{suite['setting'].get('text', suite['suite'])}. {where}; {commit}, {suite['date'][:10]}."


def _ceilings(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    gap = f"; {1e6 * found['launch']:.2f} us between launches" if found["launch"] else ""
    rates = f"copy {found['copy'] / 1e9:.1f} GB/s, read {found['read'] / 1e9:.1f} GB/s"
    return f"Measured ceilings: {rates}, {_flops(found['flops'])} in bfloat16, {_flops(found['flops_float32'])} in float32{gap}."


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


def group_markdown(name: str, cases: Sequence[Case]) -> str:
    """A group's table: a row per case; a row per x where the cases lie on an axis; a row per method where they drift."""
    if all("drift" in case for case in cases):
        return _drift_table(name, cases)
    if all("x" in case for case in cases):
        return _axis_table(name, cases)
    found = [case.get("error") or {} for case in cases]
    columns: dict[str, list[str]] = {
        "median": [time_text(case["median_ms"]) for case in cases],
        f"time / {cases[0].get('compared_to', 'first')}": [_optional(case.get("ratio"), ".2f", "x") for case in cases],
        "GB/s": [_rate(case) for case in cases],
        "of copy": [_optional(case.get("fraction_of_copy"), ".0%") for case in cases],
        "of read": [_optional(case.get("fraction_of_read"), ".0%") for case in cases],
        "measured / predicted": [_of_prediction(case) for case in cases],
        "misrounded": [percent(errors["misrounded"]) if "misrounded" in errors else "" for errors in found],
        "max error / bound": [_optional(errors.get("of_bound"), ".3g") for errors in found],
        "mean error / backbone's": [_optional(errors.get("of_backbone"), ".2f") for errors in found],
        "kernels": [_optional(case.get("counted_launches"), "d") for case in cases],
        "memory": [_bytes(case.get("memory_bytes")) for case in cases],
        "held beside": [_bytes(case.get("extra_bytes")) for case in cases],
        "allocated by a call": [_bytes(case.get("peak_bytes")) for case in cases],
    }
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [[case["title"], *(cells[index] for cells in kept.values())] for index, case in enumerate(cases)]
    return markdown_table([name, *kept], rows)


def _axis_table(name: str, cases: Sequence[Case]) -> str:
    """x down, and each series' median with its ratio to the prediction across; then the first series' ratio to the other."""
    series = list(dict.fromkeys(case["series"] for case in cases))
    found = {(case["x"], case["series"]): case for case in cases}
    axis = cases[0]["axis"]
    header = [axis if name.endswith(axis) else f"{name}: {axis}"]
    for label in series:
        header += [label, "measured / predicted"]
    ratios = any(case.get("ratio") is not None for case in cases)
    header += [f"time / {cases[0].get('compared_to', 'first')}"] if ratios else []
    rows = []
    for x in sorted({case["x"] for case in cases}):
        row = [f"{x:.3g}"]
        for label in series:
            case = found.get((x, label))
            row += [time_text(case["median_ms"]), _of_prediction(case)] if case else ["", ""]
        first = found.get((x, series[0]))
        rows.append([*row, *([_optional(first.get("ratio") if first else None, ".2f", "x")] if ratios else [])])
    return markdown_table(header, rows)


def _drift_table(name: str, cases: Sequence[Case]) -> str:
    """|W - W0| / |W0| after so many switches, the mixture taken out."""
    counts = sorted({count for case in cases for count, _ in case["drift"]})
    chosen = [count for count in counts if str(count)[0] == "1" or count == counts[-1]]
    rows = [[case["title"], *(f"{dict(map(tuple, case['drift'])).get(count, float('nan')):.2g}" for count in chosen)] for case in cases]
    header = [f"{name}: left behind after switches (the mixture itself: {cases[0]['delta']:.2g})", *map(str, chosen)]
    return markdown_table(header, rows)


def time_text(milliseconds: float) -> str:
    """A time with its unit: 12.3 us, 1.23 ms, 12.3 ms, 1.23 s."""
    if milliseconds < 0.1:
        return f"{1e3 * milliseconds:.2f} us"
    if milliseconds >= 1e3:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


def _optional(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _rate(case: Case) -> str:
    return f"{case['bytes'] / case['median_ms'] / 1e6:.1f}" if case.get("bytes") else ""


def _of_prediction(case: Case) -> str:
    return f"{case['median_ms'] / case['predicted_ms']:.2f}" if case.get("predicted_ms") else ""


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count else "0"
