"""`fusedmerge plot`: perf/results -> docs/results.md, its pictures, and marked tables of README and docs. No figure is typed anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedmerge.commands.accuracy import accuracy_markdown, accuracy_pictures
from fusedmerge.commands.plot_pictures import suite_pictures
from fusedmerge.commands.plot_tables import group_markdown, groups_of, head_markdown, suite_markdown
from fusedmerge.errors import FormatError, MissingFileError

__all__ = ["load_results", "render_results"]

REQUIRED = ("suite", "device", "driver", "versions", "git_commit", "date", "setting", "cases")
REQUIRED_OF_CASE = ("name", "group", "title")
TIMES, DRIFT = ("median_ms", "samples_ms"), ("drift", "delta")  # a case has the one or the other
_MARK = re.compile(r'(<!-- results: *([^\s,]+)(?:, group "([^"]+)")? *-->).*?<!-- /results -->', re.DOTALL)


def load_results(directory: Path) -> list[dict[str, Any]]:
    """All <device>/<suite>.json below `directory`, sorted. Raises MissingFileError if there is none, FormatError for a damaged one."""
    paths = sorted(directory.glob("*/*.json"))
    if not paths:
        raise MissingFileError("plot", "--results", "a directory with <device>/<suite>.json (run `fusedmerge bench`)", str(directory))
    return [_load(path) for path in paths]


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        missing = [name for name in REQUIRED if name not in found]
        for index, case in enumerate(found.get("cases", ())):
            fields = (*REQUIRED_OF_CASE, *(DRIFT if "drift" in case else TIMES))
            missing += [f"cases[{index}].{name}" for name in fields if name not in case]
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError("plot", str(path), "results as perf/ writes them", error) from error
    if missing:
        raise FormatError("plot", str(path), "results as perf/ writes them", f"no {', '.join(missing)}")
    return dict(found)


def render_results(results: Path, docs: Path, readme: Path | None = None) -> list[Path]:
    """Write docs/results.md and docs/img/<device>-<suite>-<kind>.png from all results, and refresh marked blocks of README and
    docs/*.md. Returns what was written; pictures of these devices that no suite has any more are removed.

    A marked block is what lies between `<!-- results: device/suite -->` and `<!-- /results -->`; `<!-- results: device/suite, group
    "name" -->` takes one table of the suite (of the accuracy experiment: group "criteria").
    """
    suites = load_results(results)
    images = docs / "img"
    images.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sections = []
    for suite in suites:
        pictures = accuracy_pictures(suite, images) if "methods" in suite else suite_pictures(suite, images)
        shown = [f"![{suite['suite']} on {suite['device']}: {kind}](img/{path.name})" for kind, path in pictures.items()]
        sections.append("\n\n".join([f"## {suite['suite']} on {suite['device']}", _markdown(suite), *shown]))
        written += pictures.values()
    for device in {suite["device"] for suite in suites}:
        for old in set(images.glob(f"{device}-*.png")) - set(written):
            old.unlink()
    page = docs / "results.md"
    page.write_text("# Results\n\nWritten by `fusedmerge plot` from perf/results; do not edit.\n\n" + "\n\n".join(sections) + "\n")
    written.append(page)
    named = {f"{suite['device']}/{suite['suite']}": suite for suite in suites}
    pages = [readme] if readme is not None and readme.is_file() else []
    written += [marked for marked in [*pages, *sorted(docs.glob("*.md"))] if marked != page and _refresh(marked, named)]
    return written


def _markdown(suite: Mapping[str, Any]) -> str:
    return accuracy_markdown(suite) if "methods" in suite else suite_markdown(suite)


def _refresh(page: Path, suites: Mapping[str, Mapping[str, Any]]) -> bool:
    """Replace the marked blocks of a page. Raises FormatError for a mark without results."""

    def block(match: re.Match[str]) -> str:
        mark, key, group = match.groups()
        if key not in suites:
            raise FormatError("plot", str(page), f"one of {', '.join(suites)} in a results mark", key)
        if "methods" in suites[key] and group == "criteria":
            return f"{mark}\n{accuracy_markdown(suites[key], methods=False)}\n<!-- /results -->"
        groups = groups_of(suites[key])
        if group is not None and group not in groups:
            raise FormatError("plot", str(page), f"one of {', '.join(groups)} as the group of a results mark", group)
        text = _markdown(suites[key]) if group is None else f"{head_markdown(suites[key])}\n\n{group_markdown(group, groups[group])}"
        return f"{mark}\n{text}\n<!-- /results -->"

    old = page.read_text()
    new = _MARK.sub(block, old)
    if new != old:
        page.write_text(new)
    return new != old
