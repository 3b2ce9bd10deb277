"""README.md, CONTRIBUTING.md and the pages of docs/ as text, by section and by table."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text under a heading of the first page that has it; the README comes first."""
    found = next(text for text in map(text_of, PAGES) if f"\n## {title}\n" in text)
    return found.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """Return the cells of the section's first table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(cell: str) -> list[str]:
    """Return what a cell puts between backticks."""
    return re.findall(r"`([^`]+)`", cell)
