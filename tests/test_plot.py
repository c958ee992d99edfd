"""fusedmerge bench and plot: from results files to tables and pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedmerge
from fusedmerge import cli
from fusedmerge.commands import plot, plot_pictures
from fusedmerge.commands.tables import markdown_table, percent, text_table
from fusedmerge.errors import FormatError, MissingFileError

ROOT = Path(fusedmerge.__file__).parent.parent


def test_bench_outside_a_checkout(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fusedmerge" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 1
    assert "checkout" in capsys.readouterr().err
    assert cli.main(["plot"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_bench_runs_pytest_on_perf(monkeypatch, tmp_path):
    pytest.importorskip("pytest_benchmark")
    commands = []

    def fake(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert cli.main(["bench", "--results", str(tmp_path), "--", "-k", "unchanged"]) == 5
    assert commands[0][:4] == [sys.executable, "-m", "pytest", str(ROOT / "perf")]
    assert commands[0][-3:] == ["-k", "unchanged", f"--results={tmp_path}"]
    cli.main(["bench", "--", "perf/test_switch.py::test_drift"])
    assert commands[1][3:] == ["-q", "-p", "no:xdist", "perf/test_switch.py::test_drift"]


CEILINGS = {"copy": 2.4e9, "read": 3e9, "flops": 5e12, "flops_float32": 1e11, "launch": 0.0}


def results(directory, **changes):
    """A results file as perf/ writes them: a comparison, a sweep, drift, and a call."""
    case = {"name": "switch", "group": "switch", "title": "ours", "samples_ms": [2.0, 4.0, 3.0], "median_ms": 3.0, "bytes": 6_000_000}
    error = {"misrounded": 0.00001, "of_bound": 0.98, "of_rounding": 1.0}
    cases = [
        {**case, "flops": 6e6, "predicted_ms": 2.5, "fraction_of_copy": 0.5, "ratio": 1.0, "compared_to": "ours", "error": error},
        {**case, "name": "peft", "title": "PEFT", "samples_ms": [30.0, 40.0], "median_ms": 35.0, "ratio": 11.7, "error": None},
        {"name": "call", "group": "call", "title": "unchanged", "samples_ms": [0.004], "median_ms": 0.004},
        {"name": "peft", "group": "drift", "title": "PEFT", "drift": [[1, 0.001], [20, 0.004]], "delta": 0.05},
        {"name": "exact", "group": "drift", "title": "exact", "drift": [[1, 0.0], [20, 0.0]], "delta": 0.05},
    ]
    for x, milliseconds in ((8, 1.0), (16, 3.0)):
        point = {"group": "time against rank", "axis": "rank", "x": x, "compared_to": "copy", "bytes": 10, "flops": 20}
        ours = {"name": f"s{x}", "title": f"s{x}", "series": "switch", "median_ms": milliseconds, "samples_ms": [milliseconds]}
        cases.append({**point, **ours, "predicted_ms": 0.5, "ratio": 1.5})
        cases.append({**point, "name": f"c{x}", "title": f"c{x}", "series": "copy", "median_ms": 2.0, "samples_ms": [2.0], "ratio": 1.0})
    content = {
        "suite": "switch", "device": "cpu-2core", "processor": "A processor", "driver": None, "versions": {"torch": "2.13"},
        "git_commit": "0123456789abcdef", "git_dirty": False, "date": "2026-01-02T03:04:05+00:00",
        "setting": {"text": "A model", "ceilings": CEILINGS}, "cases": cases, **changes,
    }  # fmt: skip
    path = directory / content["device"] / "switch.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "removed"}))
    return path


def test_plot_writes_tables_and_pictures(tmp_path, capsys):
    results(tmp_path / "results")
    images = tmp_path / "docs" / "img"
    images.mkdir(parents=True)
    for old in ("cpu-2core-gone-bars.png", "drawing.png", "gpu-switch-bars.png"):
        (images / old).touch()
    assert cli.main(["plot", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    for line in (
        "| ours | 3.00 ms | 1.00x | 2.0 | 50% | 1.20 | 0.001 % | 0.98 |",
        "| PEFT | 35.0 ms | 11.70x | 0.2 |  |  |  |  |",
        "| call | median |\n| --- | ---: |\n| unchanged | 4.00 us |",
        "| rank | switch | measured / predicted | copy | measured / predicted | time / copy |",
        "| 16 | 3.00 ms | 6.00 | 2.00 ms |  | 1.50x |",
        "| drift: left behind after switches (the mixture itself: 0.05) | 1 | 20 |\n| --- | ---: | ---: |\n| PEFT | 0.001 | 0.004 |",
        "Measured ceilings: copy 2.4 GB/s, read 3.0 GB/s, 5 TFLOP/s in bfloat16, 100 GFLOP/s in float32.",
        "commit 0123456789, 2026-01-02",
    ):
        assert line in page, line
    pictures = [images / f"cpu-2core-switch-{kind}.png" for kind in ("bars", "curves", "roofline", "drift")]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"(img/{picture.name})" in page
    assert capsys.readouterr().out.splitlines() == [*map(str, pictures), str(tmp_path / "docs" / "results.md")]
    assert sorted(images.iterdir()) == sorted([*pictures, images / "drawing.png", images / "gpu-switch-bars.png"])


def test_pictures_show_what_the_file_says(tmp_path, monkeypatch):
    """Measured and predicted values reach the axes as they are."""
    drawn = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.update({path.stem: figure}))
    plot_pictures.suite_pictures(json.loads(results(tmp_path / "results").read_text()), tmp_path)
    bars, call = drawn["cpu-2core-switch-bars"].axes
    assert [bar.get_width() for bar in bars.patches] == [3.0, 35.0] and [bar.get_width() for bar in call.patches] == [0.004]
    assert [2.5, 2.5] in [list(line.get_xdata()) for line in bars.lines]
    (curves,) = drawn["cpu-2core-switch-curves"].axes
    lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in curves.lines]
    assert ("switch, predicted", [8, 16], [0.5, 0.5]) in lines and ([8, 16], [1.0, 3.0]) in [line[1:] for line in lines]
    (roof,) = drawn["cpu-2core-switch-roofline"].axes
    placed = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in roof.lines}
    assert placed["ours"] == pytest.approx((1.0, 2.0))  # 6 MFLOP over 6 MB, in 3 ms: 2 GFLOP/s
    drift = {line.get_label(): list(line.get_ydata()) for line in drawn["cpu-2core-switch-drift"].axes[0].lines}
    assert drift["PEFT unmerge + merge"] == [0.001, 0.004] and drift["Switcher, exact: 0 at every count"] == [0.0001, 0.0001]


def test_plot_refreshes_marked_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "suite_pictures", lambda *_: {})
    results(tmp_path / "results")
    readme = tmp_path / "README.md"
    marks = ("<!-- results: cpu-2core/switch -->", '<!-- results: cpu-2core/switch, group "call" -->')
    readme.write_text(f"Before\n{marks[0]}\nold\n<!-- /results -->\nBetween\n{marks[1]}\nold\n<!-- /results -->\nAfter\n")
    assert readme in plot.render_results(tmp_path / "results", tmp_path / "docs", readme)
    whole, one = readme.read_text().split("\nBetween\n")
    assert whole.startswith(f"Before\n{marks[0]}\nA model. ") and "| PEFT |" in whole and whole.endswith("\n<!-- /results -->")
    assert one.startswith(f"{marks[1]}\nA model. ") and "| unchanged |" in one and "PEFT" not in one
    assert one.endswith("\n<!-- /results -->\nAfter\n") and "old" not in whole + one
    assert readme not in plot.render_results(tmp_path / "results", tmp_path / "docs", readme)
    for mark, wrong in (("gpu/none", "gpu/none"), ('cpu-2core/switch, group "speed"', "speed")):
        readme.write_text(f"<!-- results: {mark} -->\n<!-- /results -->")
        with pytest.raises(FormatError, match=wrong):
            plot.render_results(tmp_path / "results", tmp_path / "docs", readme)


def test_plot_refuses_damaged_results(tmp_path):
    with pytest.raises(MissingFileError, match="fusedmerge bench"):
        plot.load_results(tmp_path / "none")
    path = results(tmp_path / "results", git_commit="removed")
    with pytest.raises(FormatError, match="no git_commit"):
        plot.load_results(tmp_path / "results")
    content = json.loads(path.read_text()) | {"git_commit": None}
    del content["cases"][1]["median_ms"]
    del content["cases"][3]["delta"]
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"no cases\[1\].median_ms, cases\[3\].delta"):
        plot.load_results(tmp_path / "results")
    path.write_text(path.read_text()[:100])
    with pytest.raises(FormatError, match=re.escape(str(path))):
        plot.load_results(tmp_path / "results")


@pytest.mark.slow
def test_docs_are_what_the_committed_results_give(tmp_path):
    """docs/results.md and README's blocks, from perf/results; every picture is there."""
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    written = plot.render_results(ROOT / "perf" / "results", tmp_path / "docs", readme)
    assert readme not in written  # nothing had to be changed
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    drawn = {path.name for path in written if path.suffix == ".png"}
    assert drawn <= {path.name for path in (ROOT / "docs" / "img").iterdir()}


def test_tables():
    assert text_table(["name", "n"], [("a", 1), ("long", 22)]) == "name   n\n----  --\na      1\nlong  22"
    assert markdown_table(["x", "y"], [("a|b", 1)]) == "| x | y |\n| --- | ---: |\n| a\\|b | 1 |"
    assert [percent(x) for x in (0, 0.000003, 0.0025, 0.123, 1)] == ["0 %", "0.0003 %", "0.25 %", "12.3 %", "100.0 %"]
