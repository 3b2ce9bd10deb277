"""Texts with two entities marked, for the relation between them: classification of a text with marks in it.

The marks are those of Zhou and Chen 2022, "An Improved Baseline for Sentence-level Relation Extraction", section 3.1
("entity marker (punct)"): `@` around the first entity and `#` around the second. They are tokens of nearly every
vocabulary, so that a pretrained model needs no new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import DataError
from engine.tasks.records import value_of
from engine.tasks.words import Span, split

MARKS = ("@", "#")
"""Marks around the first and the second entity."""


def marked(location: str, row: int, record: Mapping[str, Any], columns: tuple[str, str], text: str) -> tuple[str, int]:
    """Return a row's text with marks around its two entities, and the number of characters up to the last mark.

    `columns` name the spans, `{start, end}` in characters of `text`.

    Raises:
        DataError: a span does not fit the text, cuts a word, or both overlap.
    """
    spans = [_span(location, row, name, value_of(location, row, record, name), text) for name in columns]
    (first, mark), (second, other) = sorted(zip(spans, MARKS, strict=True))
    if second.start < first.end:
        raise DataError(
            f"row {row} of {location} has entities that overlap: characters {first.start} to {first.end} and "
            f"{second.start} to {second.end}",
            "two entities beside each other",
            "mend or drop the row",
        )
    before, between, behind = text[: first.start], text[first.end : second.start], text[second.end :]
    upto = f"{before}{mark} {text[slice(*first)]} {mark}{between}{other} {text[slice(*second)]} {other}"
    return upto + behind, len(upto)


def _span(location: str, row: int, name: str, value: Any, text: str) -> Span:
    given = value if isinstance(value, Mapping) else {}
    start, end = given.get("start"), given.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise DataError(
            f"row {row} of {location} has {value!r:.60} in column {name!r}",
            f"an object with start and end, 0 <= start < end <= {len(text)} (characters of the text)",
            "mend the row",
        )
    cut = next((word for word in split(text) if word.start < start < word.end or word.start < end < word.end), None)
    if cut is not None or text[start:end] != text[start:end].strip():
        what = "has blanks at its ends" if cut is None else f"cuts the word {text[slice(*cut)]!r}"
        raise DataError(
            f"row {row} of {location}: the entity {text[start:end]!r} at characters {start} to {end} {what}",
            "entities of whole words",
            "mend start and end, which count characters from 0, the end being the one behind the last",
        )
    return Span(start, end)
