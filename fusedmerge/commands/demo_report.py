"""The demo's report as text."""

from __future__ import annotations

from typing import Any

from fusedmerge.commands.tables import percent, text_table

__all__ = ["render"]

TITLES = {"peft": "PEFT unmerge + merge", "inplace": "Switcher, inplace", "exact": "Switcher, exact"}


def render(report: dict[str, Any]) -> str:
    """All tables, in the order of the demo."""
    parts = [_model(report), _accuracy(report["accuracy"]), _drift(report["drift"]), _time(report["drift"])]
    parts.append(_checks(report))
    return "\n\n".join(parts)


def _model(report: dict[str, Any]) -> str:
    model, versions = report["model"], report["versions"]
    lines = [
        f"Llama, {model['parameters'] / 1e6:.1f} M parameters in {model['dtype']}, {model['targets']} adapted matrices; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    ]
    rows = [
        (name, "/".join(map(str, entry["ranks"])), entry["targets"], f"{model['cast_error'][name]:.1e}")
        for name, entry in model["adapters"].items()
    ]
    lines.append(text_table(["adapter (saved by PEFT)", "rank", "targets", "cast to the bank's dtype"], rows))
    return "\n\n".join(lines)


def _accuracy(found: dict[str, Any]) -> str:
    mixture = " + ".join(f"{gate:g} {name}" for name, gate in found["mixture"].items())
    rows = [
        (
            row["method"],
            row["truth"],
            percent(row["misrounded"]),
            f"{row['of_rounding']:.3f}",
            f"{row['of_bound']:.3g}",
            f"{row['logits']:.1e}",
        )
        for row in found["rows"]
    ]
    header = [f"merge of {mixture}", "float64 truth over", "misrounded", "error / rounding", "max error / bound", "logits, relative"]
    note = (
        "(misrounded: weights other than the truth correctly rounded; error / rounding: root mean square, 1 is the best that the dtype\n"
        " can do; bound: half an ulp and float32 accumulation, what the switch promises; logits: float64 arithmetic on the weights)"
    )
    return "\n".join([text_table(header, rows), note])


def _drift(found: dict[str, Any]) -> str:
    methods = found["methods"]
    marks = [mark for mark, _ in methods["exact"]["drift"] if str(mark)[0] == "1"]
    if marks[-1] != found["switches"]:
        marks.append(found["switches"])
    rows = []
    for name, entry in methods.items():
        values = dict(entry["drift"])
        rows.append([TITLES[name], *(f"{values[mark]:.1e}" if values[mark] else "0" for mark in marks), percent(entry["changed"])])
    header = ["drift |W - W0| / |W0| after", *(f"{mark:,}" for mark in marks), "weights changed"]
    return text_table(header, rows) + f"\n(the shown mixture's own |delta| / |W| is {found['delta']:.1e})"


def _time(found: dict[str, Any]) -> str:
    rows = [
        (TITLES[name], f"{entry['median_ms']:.2f}", f"{entry['peft_over_this']:.1f}x", f"{entry['extra_bytes'] / 2**20:.1f}")
        for name, entry in found["methods"].items()
    ]
    note = f"(medians over {found['switches']:,} switches, the methods in turn, {found['threads']} thread; speed is the median of ratios)"
    return text_table(["switching", "ms / switch", "speed beside PEFT", "extra MiB"], rows) + "\n" + note


def _checks(report: dict[str, Any]) -> str:
    exact, saved = report["drift"]["methods"]["exact"], report["checkpoint"]
    count = f"{report['drift']['switches']:,}"
    checks = [
        (f"exact: restore() after {count} switches gives the original bits", exact["restored_bitwise"]),
        (f"exact: the shown mixture has the same bits before and after {count} switches", report["drift"]["merged_bitwise_as_first"]),
        ("exact: no weight's data_ptr has moved", exact["pointers_stable"]),
        ("fusedmerge merge writes the bits that a Switcher with a float32 bank sets", report["accuracy"]["files_as_switcher"]),
        ("a live merged model, saved by save_pretrained and loaded back, has the same bits", saved["loaded_equals_live"]),
    ]
    return "\n".join(f"{'yes' if held else 'NO '}  {text}" for text, held in checks)
