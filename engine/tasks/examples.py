"""Texts and pairs of texts with a label each: the examples of classification and of regression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding

from engine.config.schema.data import ColumnsConfig
from engine.errors import DataError
from engine.tasks.records import label_of, read_records, text_of
from engine.tasks.relations import MARKS, marked


@dataclass(frozen=True)
class TextExamples:
    """The examples of a file, one entry of each list per example."""

    location: str
    texts: list[str]
    pairs: list[str] | None
    """The second texts; None where examples are single texts."""
    labels: list[str]
    """Labels as text; those of a regression are numbers (`numbers`)."""
    needed: list[int] | None = None
    """Number of characters of each text that the model has to see: those up to the last mark of an entity."""

    def __len__(self) -> int:
        return len(self.texts)

    def numbers(self) -> list[float]:
        """Return the labels as numbers. Raises `DataError` at the first that is none."""
        found = []
        for row, label in enumerate(self.labels, start=1):
            try:
                found.append(float(label))
            except ValueError:
                found.append(math.nan)
            if not math.isfinite(found[-1]):
                raise DataError(
                    f"row {row} of {self.location} has label {label!r}",
                    "a number, as objective regression predicts",
                    "mend the row, or use objective classification",
                )
        return found

    def numbered(self, labels: tuple[str, ...]) -> list[int]:
        """Return the number of each label. Raises `DataError` at the first that is not among `labels`."""
        numbers = {name: number for number, name in enumerate(labels)}
        # Files may have the numbers of labels that the run file names.
        if not numbers.keys() & {*self.labels} and {*self.labels} <= {str(number) for number in range(len(labels))}:
            numbers = {str(number): number for number in range(len(labels))}
        for row, label in enumerate(self.labels, start=1):
            if label not in numbers:
                raise DataError(
                    f"row {row} of {self.location} has label {label!r}, which is not among those of the training data",
                    ", ".join(labels),
                    "mend the row, name all labels in objective.labels, or give the training data examples of it",
                )
        return [numbers[label] for label in self.labels]


def read_examples(location: str, columns: ColumnsConfig) -> TextExamples:
    """Read a file or a folder of examples.

    Raises:
        DataError: it cannot be read, a column is missing, or a value is no text, is empty or has no label.
    """
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[str] = []
    needed: list[int] = []
    first_sort: str | None = None
    for row, record in enumerate(read_records(location), start=1):
        texts.append(text_of(location, row, record, columns.text))
        if columns.entities_of_relation is not None:
            texts[-1], upto = marked(location, row, record, columns.entities_of_relation, texts[-1])
            needed.append(upto)
        if columns.pair is not None:
            pairs.append(text_of(location, row, record, columns.pair))
        labels.append(label_of(location, row, record, columns.label))
        sort = _sort(record[columns.label])
        if (first_sort := first_sort or sort) != sort:
            raise DataError(
                f"row {row} of {location} has label {record[columns.label]!r:.60} in column {columns.label!r}, {sort}, "
                f"where the rows before have {first_sort}",
                "one type in a column",
                "write all labels as text, or all as numbers",
            )
    if not texts:
        raise DataError(f"{location} holds no example", "one or more", "check the file")
    return TextExamples(location, texts, pairs if columns.pair is not None else None, labels, needed or None)


def _sort(value: Any) -> str:
    """Return the sort of a label's value, in words."""
    return "true or false" if isinstance(value, bool) else "text" if isinstance(value, str) else "a number"


def require_marks(examples: TextExamples, row: int, found: Encoding, unknown_id: int | None) -> None:
    """Raise `DataError` where an encoded text, row `row` from 0, lacks a mark of its entities."""
    if examples.needed is None:
        return
    inside = [at for at, sequence in enumerate(found.sequence_ids) if sequence == 0]
    if not inside or found.offsets[inside[-1]][1] < examples.needed[row]:
        raise DataError(
            f"row {row + 1} of {examples.location} is cut to {len(found.ids)} tokens, in which not both entities are",
            "rows that hold both entities",
            "raise sequence_length, or shorten or drop the row",
        )
    text = examples.texts[row]
    if any(found.ids[at] == unknown_id and text[slice(*found.offsets[at])].strip() in MARKS for at in inside):
        raise DataError(
            f"the tokenizer has no token for {' or '.join(MARKS)}, which mark the entities of {examples.location}",
            "a tokenizer that spells both",
            "add them with `palimpsest tokenizer --extend`, or start from another model",
        )


def find_labels(examples: TextExamples) -> tuple[str, ...]:
    """Return the labels that occur, in the order of their numbers where all are whole numbers, else of their names.

    Raises:
        DataError: there is one label alone.
    """
    found = {*examples.labels}
    if len(found) < 2:
        raise DataError(
            f"every example of {examples.location} has label {next(iter(found))!r}",
            "examples of two labels or more",
            "check data.columns.label, or name the labels in objective.labels",
        )
    is_numbers = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=int) if is_numbers else sorted(found))


def require_examples_of(labels: tuple[str, ...], examples: TextExamples, numbers: list[int]) -> None:
    """Raise `DataError` where a label has no example in the training data."""
    absent = [name for number, name in enumerate(labels) if number not in {*numbers}]
    if absent:
        raise DataError(
            f"{examples.location} has no example of label {', '.join(absent)}",
            "examples of every label in objective.labels",
            "leave the label out, or add examples of it",
        )
