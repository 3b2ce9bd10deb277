"""A set for relation extraction, derived from entity data: none of the task sets has relations.

Each two neighbouring entities of a sentence are a row, in which they are marked; their relation is the pair of their
types in the order of the text, such as `PER-LOC`. It stands for a relation: the label follows from two marked spans and
their surroundings, and not from the text alone. Pairs with fewer than `FEWEST_ROWS` training rows are one, `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
FEWEST_ROWS = 20
OTHER = "other"
COLUMNS = {"text": "text", "entities_of_relation": ["head", "tail"], "label": "label"}
"""Columns of a row: the text, the first and the second entity as `{start, end}` in characters, and the label."""


def relations_of(train: Sequence[Row], test: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows with relations of both halves; which pairs of types are rare is decided by the training half."""
    found = [pair for row in train for pair in _pairs(row)], [pair for row in test for pair in _pairs(row)]
    counts = Counter(pair["label"] for pair in found[0])
    for pair in [*found[0], *found[1]]:
        pair["label"] = pair["label"] if counts[pair["label"]] >= FEWEST_ROWS else OTHER
    return found


def _pairs(row: Row) -> Iterator[Row]:
    """Yield a sentence with each two neighbouring entities."""
    starts = [0]  # character at which each token begins, where blanks join them
    for token in row["tokens"]:
        starts.append(starts[-1] + len(token) + 1)
    for pair in pairwise(_entities(row["tags"])):
        head, tail = ({"start": starts[first], "end": starts[last + 1] - 1} for first, last, _ in pair)
        label = "-".join(kind for _, _, kind in pair)
        yield {"text": " ".join(row["tokens"]), "head": head, "tail": tail, "label": label}


def _entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (first token, last token, type) of each run of tokens with one IO tag (`I-PER`, `O`)."""
    found: list[tuple[int, int, str]] = []
    for number, tag in enumerate(tags):
        kind = tag.partition("-")[2]
        if kind and found and found[-1][1:] == (number - 1, kind):
            found[-1] = (found[-1][0], number, kind)
        elif kind:
            found.append((number, number, kind))
    return found


def marked_text(row: Row) -> str:
    """Return a row's text with `@` around the first entity and `#` around the second (Zhou and Chen 2022)."""
    text = row["text"]
    for mark, span in (("#", row["tail"]), ("@", row["head"])):  # from the end, so that earlier characters stay
        text = f"{text[: span['start']]}{mark} {text[span['start'] : span['end']]} {mark}{text[span['end'] :]}"
    return text
