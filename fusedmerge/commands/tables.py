"""Plain-text and markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "percent", "text_table"]


def percent(share: float) -> str:
    """A share as a percentage that never rounds a small one to nothing: 0 %, 0.0003 %, 12.3 %."""
    if share == 0:
        return "0 %"
    value = 100 * share
    return f"{value:.1f} %" if abs(value) >= 1 else f"{value:.1g} %" if abs(value) < 0.1 else f"{value:.2f} %"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table: the first column to the left, the others to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
