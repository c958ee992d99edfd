"""The demo's report as text."""

from __future__ import annotations

from typing import Any

from fusedmerge.commands.tables import percent, text_table

__all__ = ["render"]

TITLES = {"peft": "PEFT unmerge + merge", "inplace": "Switcher, inplace", "exact": "Switcher, exact"}
DECODE_BOUND = 2.5


def render(report: dict[str, Any]) -> str:
    """All tables, in the order of the demo."""
    parts = [_model(report), _accuracy(report["accuracy"]), _drift(report["drift"]), _time(report["drift"]), _decode(report["decode"])]
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


def _decode(found: dict[str, Any]) -> str:
    counted = "launches" if found["device"] == "cuda" else "operations"
    tables = []
    for engine in dict.fromkeys(row["engine"] for row in found["rows"]):
        rows = [
            (
                f"{row['method']}, {row['strategy']}" if row["strategy"] != "backbone" else "backbone, no experts",
                f"{row['median_ms']:.2f}",
                f"{100 * row['over_backbone']:+.0f} %" if row["strategy"] != "backbone" else "",
                row["launches"],
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['max_error']:.1e}",
            )
            for row in found["rows"]
            if row["engine"] == engine
        ]
        name = "the reference decoder" if engine == "decoder" else engine
        tables.append(text_table([f"decoding by {name}", "ms / token", "over backbone", counted, "peak MiB", "max error"], rows))
    note = (
        f"(batch 1, {found['tokens']} tokens after a prompt of {found['prompt']}, medians, the rows in turn; {found['experts']} experts of "
        f"rank {found['rank']}, top {found['top_k']}, for every method;\n error: of a token's logits, relative, against float64 over the "
        f"same routes; {counted}: of one decoded token)"
    )
    return "\n\n".join(tables) + "\n" + note


def _decode_checks(found: dict[str, Any]) -> list[tuple[str, bool]]:
    rows = {(row["engine"], row["method"], row["strategy"]): row for row in found["rows"]}
    backbone = rows["decoder", "(no experts)", "backbone"]
    merged = rows["decoder", "lora_switch", "merged"]["launches"] - backbone["launches"]
    near = all(row["max_error"] <= DECODE_BOUND * backbone["max_error"] for row in found["rows"])
    return [
        (f"decoding: every method's error is within {DECODE_BOUND} times the backbone's own bfloat16 rounding", near),
        (
            f"decoding: merged adds 1 launch and the router's {found['router_launches']} to the backbone's",
            merged == 1 + found["router_launches"],
        ),
        ("decoding: every model has its original bits afterwards", all(row["restored_bitwise"] for row in found["rows"])),
    ]


def _checks(report: dict[str, Any]) -> str:
    exact, saved = report["drift"]["methods"]["exact"], report["checkpoint"]
    count = f"{report['drift']['switches']:,}"
    checks = [
        (f"exact: restore() after {count} switches gives the original bits", exact["restored_bitwise"]),
        (f"exact: the shown mixture has the same bits before and after {count} switches", report["drift"]["merged_bitwise_as_first"]),
        ("exact: no weight's data_ptr has moved", exact["pointers_stable"]),
        ("fusedmerge merge writes the bits that a Switcher with a float32 bank sets", report["accuracy"]["files_as_switcher"]),
        ("a live merged model, saved by save_pretrained and loaded back, has the same bits", saved["loaded_equals_live"]),
        *_decode_checks(report["decode"]),
    ]
    return "\n".join(f"{'yes' if held else 'NO '}  {text}" for text, held in checks)
