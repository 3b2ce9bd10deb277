"""Statistics of a corpus for the terminal: counts as a table, lengths as bars."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from engine.corpus.statistics import Statistics
from engine.data.visible import visible

_BAR_WIDTH = 30


def counts_table(parts: dict[str, Statistics]) -> Table:
    """Return the counts of folders of shards as a table; columns that are 0 everywhere are left out."""
    columns = {
        "documents": [part.documents for part in parts.values()],
        "empty": [part.empty_documents for part in parts.values()],
        "same": [part.exact_duplicates for part in parts.values()],
        "nearly same": [part.near_duplicates for part in parts.values()],
        "sentences": [part.sentences for part in parts.values()],
        "tokens": [part.tokens for part in parts.values()],
    }
    columns = {name: counts for name, counts in columns.items() if any(counts)}
    rates = {"bytes per token": [f"{part.bytes_per_token:.2f}" for part in parts.values()]}
    rates["unknown"] = [f"{part.unknown_rate:.4%}" for part in parts.values()]
    if any(part.unspelt_bytes for part in parts.values()):
        rates["unspelt"] = [f"{part.unspelt_rate:.4%}" for part in parts.values()]
    found = Table("part", *columns, *rates)
    for row, name in enumerate(parts):
        figures = [f"{counts[row]:,}" for counts in columns.values()]
        found.add_row(Text(visible(name)), *figures, *(rate[row] for rate in rates.values()))
    return found


def histogram(part: Statistics) -> str:
    """Return the number of documents by length as lines of text, one per power of two."""
    largest = max(part.lengths.values(), default=1)
    lines = []
    # Exponents without a document are shown as well, so that bars compare at a glance. Without any document the
    # defaults make the range empty.
    for power in range(min(part.lengths, default=0), max(part.lengths, default=-1) + 1):
        count = part.lengths[power]
        bar = "#" * round(_BAR_WIDTH * count / largest)
        lines.append(f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,} {count:>10,} {bar}".rstrip())
    return "\n".join(lines)
