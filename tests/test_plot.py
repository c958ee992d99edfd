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
from fusedmerge.commands import plot
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


def results(directory, **changes):
    """A results file as perf/ writes them, of two cases."""
    case = {"name": "switch", "group": "switch", "title": "ours", "samples_ms": [2.0, 4.0, 3.0], "median_ms": 3.0, "bytes": 6_000_000}
    error = {"misrounded": 0.00001, "of_bound": 0.98, "of_rounding": 1.0}
    cases = [
        {**case, "fraction_of_copy": 0.5, "ratio": 1.0, "compared_to": "ours", "error": error},
        {**case, "name": "peft", "title": "PEFT", "samples_ms": [30.0, 40.0], "median_ms": 35.0, "ratio": 11.7, "error": None},
        {"name": "call", "group": "call", "title": "unchanged", "samples_ms": [0.004], "median_ms": 0.004},
    ]
    content = {
        "suite": "switch_cpu", "device": "cpu-2core", "processor": "A processor", "driver": None, "versions": {"torch": "2.13"},
        "git_commit": "0123456789abcdef", "git_dirty": False, "date": "2026-01-02T03:04:05+00:00", "setting": {"text": "A model"},
        "cases": cases, **changes,
    }  # fmt: skip
    path = directory / content["device"] / "switch_cpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "removed"}))
    return path


def test_plot_writes_tables_and_pictures(tmp_path, capsys):
    results(tmp_path / "results")
    assert cli.main(["plot", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| ours | 3.00 ms | 1.00x | 2.0 | 50% | 0.001 % | 0.98 |" in page
    assert "| PEFT | 35.0 ms | 11.70x | 0.2 |  |  |  |" in page
    assert "| call | median |\n| --- | ---: |\n| unchanged | 4.00 us |" in page
    assert "commit 0123456789, 2026-01-02" in page
    picture = tmp_path / "docs" / "img" / "cpu-2core-switch_cpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == [str(picture), str(tmp_path / "docs" / "results.md")]


def test_plot_refreshes_marked_blocks(tmp_path):
    results(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("Before\n<!-- results: cpu-2core/switch_cpu -->\nold\n<!-- /results -->\nAfter\n")
    assert readme in plot.render_results(tmp_path / "results", tmp_path / "docs", readme)
    text = readme.read_text()
    assert text.startswith("Before\n<!-- results: cpu-2core/switch_cpu -->\nA model. ")
    assert text.endswith("\n<!-- /results -->\nAfter\n")
    assert "old" not in text
    assert readme not in plot.render_results(tmp_path / "results", tmp_path / "docs", readme)
    readme.write_text("<!-- results: gpu/none -->\n<!-- /results -->")
    with pytest.raises(FormatError, match="gpu/none"):
        plot.render_results(tmp_path / "results", tmp_path / "docs", readme)


def test_plot_refuses_damaged_results(tmp_path):
    with pytest.raises(MissingFileError, match="fusedmerge bench"):
        plot.load_results(tmp_path / "none")
    path = results(tmp_path / "results", git_commit="removed")
    with pytest.raises(FormatError, match="no git_commit"):
        plot.load_results(tmp_path / "results")
    content = json.loads(path.read_text()) | {"git_commit": None}
    del content["cases"][1]["median_ms"]
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"no cases\[1\].median_ms"):
        plot.load_results(tmp_path / "results")
    path.write_text(path.read_text()[:100])
    with pytest.raises(FormatError, match=re.escape(str(path))):
        plot.load_results(tmp_path / "results")


@pytest.mark.parametrize("path", sorted((ROOT / "perf" / "results").glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_results_can_be_rendered(path):
    assert "median" in plot.suite_markdown(plot._load(path))


def test_tables():
    assert text_table(["name", "n"], [("a", 1), ("long", 22)]) == "name   n\n----  --\na      1\nlong  22"
    assert markdown_table(["x", "y"], [("a|b", 1)]) == "| x | y |\n| --- | ---: |\n| a\\|b | 1 |"
    assert [percent(x) for x in (0, 0.000003, 0.0025, 0.123, 1)] == ["0 %", "0.0003 %", "0.25 %", "12.3 %", "100.0 %"]
