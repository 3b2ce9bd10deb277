"""Rows of text in columns, for commands that print tables."""

from __future__ import annotations


def aligned(rows: list[list[str]]) -> str:
    """Return rows in columns: the first to the left, the others to the right. A Chinese character is two wide."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0] + gaps[0], *(gap + cell for gap, cell in zip(gaps[1:], row[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)
