"""Words with a label each: the examples of token classification.

A file has lists of words and of their tags, or texts with spans of characters. Both become a text, the characters of
each of its words, and a tag for each word: `B-TYPE` where an entity begins, `I-TYPE` inside of it, `O` outside.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.records import read_records, text_of, value_of

OUTSIDE = "O"
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003ffff"
"""Characters that are words of their own, written without blanks: Chinese characters, as BERT's tokenizer takes them,
and Japanese kana."""
_WORD = re.compile(rf"[{CHINESE}]|(?:(?![{CHINESE}])\w)+|[^\w\s]")
_CHINESE = re.compile(f"[{CHINESE}]")
_TAG = re.compile(r"O|[BI]-.+", re.DOTALL)


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class WordExamples:
    """The examples of a file, one entry of each list per example."""

    location: str
    texts: list[str]
    words: list[list[Span]]
    tags: list[list[str]]
    has_spans: bool
    """True if the file has spans of characters, and not words."""

    def __len__(self) -> int:
        return len(self.texts)


def read_words(location: str, columns: ColumnsConfig) -> WordExamples:
    """Read a file or a folder of examples.

    Raises:
        DataError: it cannot be read, a column is missing, tags do not fit the words, or a span does not fit the text.
    """
    texts: list[str] = []
    words: list[list[Span]] = []
    tags: list[list[str]] = []
    has_spans = False
    for row, record in enumerate(read_records(location), start=1):
        if row == 1:  # the first row says which of both the file has
            has_spans = columns.entities in record and columns.tokens not in record
        text, of_row, tags_of_row = (_spans if has_spans else _words)(location, row, record, columns)
        texts.append(text)
        words.append(of_row)
        tags.append(tags_of_row)
    if not texts:
        raise DataError(f"{location} holds no example", "one or more", "check the file")
    return WordExamples(location, texts, words, tags, has_spans)


def _words(
    location: str, row: int, record: Mapping[str, Any], columns: ColumnsConfig
) -> tuple[str, list[Span], list[str]]:
    words, tags = (value_of(location, row, record, name) for name in (columns.tokens, columns.tags))
    for name, values in ((columns.tokens, words), (columns.tags, tags)):
        if (
            not isinstance(values, list)
            or not values
            or not all(isinstance(one, str) and one.strip() for one in values)
        ):
            raise DataError(
                f"row {row} of {location} has {values!r:.60} in column {name!r}",
                "a list of text, none of it empty",
                "mend or drop the row",
            )
    if len(words) != len(tags):
        raise DataError(
            f"row {row} of {location} has {len(words)} words and {len(tags)} tags",
            "a tag for each word",
            "mend the row",
        )
    text, spans = join(words)
    return text, spans, [_tag(location, row, tag) for tag in tags]


def _tag(location: str, row: int, tag: str) -> str:
    if not _TAG.fullmatch(tag):
        raise DataError(
            f"row {row} of {location} has tag {tag!r}",
            "O, B-TYPE or I-TYPE (BIO)",
            "convert the tags; labels of words that are no entities can be written as B-LABEL",
        )
    return tag


def join(words: list[str]) -> tuple[str, list[Span]]:
    """Return the text of words, and the characters of each: blanks between them, but where Chinese meets."""
    text, spans = "", list[Span]()
    for word in words:
        if text and not (_CHINESE.match(word) and _CHINESE.match(text[-1])):
            text += " "
        spans.append(Span(len(text), len(text) + len(word)))
        text += word
    return text, spans


def split(text: str) -> list[Span]:
    """Return the words of a text: Chinese characters, runs of other letters and digits, and marks."""
    return [Span(*found.span()) for found in _WORD.finditer(text)]


def _spans(
    location: str, row: int, record: Mapping[str, Any], columns: ColumnsConfig
) -> tuple[str, list[Span], list[str]]:
    text = text_of(location, row, record, columns.text)
    entities = sorted(_entities(location, row, value_of(location, row, record, columns.entities), len(text)))
    for (first, _), (second, _) in itertools.pairwise(entities):
        if second.start < first.end:
            raise DataError(
                f"row {row} of {location} has entities that overlap: characters {first.start} to {first.end} and "
                f"{second.start} to {second.end}",
                "entities beside each other",
                "keep one of them",
            )
    words = split(text)
    tags = [OUTSIDE] * len(words)
    for span, label in entities:
        inside = [number for number, word in enumerate(words) if word.start < span.end and span.start < word.end]
        cut = [word for word in (words[number] for number in inside) if word.start < span.start or span.end < word.end]
        if cut or not inside:
            what = f"cuts the word {text[slice(*cut[0])]!r}" if cut else "holds no word"
            raise DataError(
                f"row {row} of {location}: the entity {text[slice(*span)]!r} at characters {span.start} to {span.end} "
                f"{what}",
                "entities of whole words",
                "mend start and end, which count characters from 0, the end being the one behind the last",
            )
        for position, number in enumerate(inside):
            tags[number] = f"{'I' if position else 'B'}-{label}"
    if not words:
        raise DataError(f"row {row} of {location} has no word", "text", "drop the row")
    return text, words, tags


def _entities(location: str, row: int, entities: Any, length: int) -> Iterator[tuple[Span, str]]:
    for one in entities if isinstance(entities, list) else [None]:
        one = one if isinstance(one, dict) else {}
        start, end, label = one.get("start"), one.get("end"), one.get("label")
        if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
            raise DataError(
                f"row {row} of {location} has entities {entities!r:.80}",
                "a list of objects with start and end (numbers of characters) and label",
                "mend the row",
            )
        if not 0 <= start < end <= length:
            raise DataError(
                f"row {row} of {location} has an entity at characters {start} to {end} of a text of {length}",
                f"0 <= start < end <= {length}",
                "mend start and end",
            )
        yield Span(start, end), label


def inside_without_begin(tags: list[str]) -> int:
    """Return the number of entities that begin with `I-TYPE`: behind O or another type, as the IO scheme writes all."""
    return sum(tag.startswith("I-") and before[1:] != tag[1:] for before, tag in itertools.pairwise([OUTSIDE, *tags]))
