"""Labelled examples as people keep them: JSON lines, CSV, Parquet, or a folder that Hugging Face's datasets saved.

Every error names the file, the row and the column. Rows are numbered from 1, as editors and spreadsheets do.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema.data import ColumnsConfig
from engine.corpus.sources import text_files
from engine.errors import DataError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Endings of the files, compressed ones (`text_files.SUFFIXES`) having another one behind it."""


@dataclass(frozen=True)
class Examples:
    """The examples of a file, one entry of each list per example."""

    location: str
    texts: list[str]
    pairs: list[str] | None
    """The second texts; None where examples are single texts."""
    labels: list[str]
    """Labels as text; those of a regression are numbers (`numbers`)."""

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


def read_examples(location: str, columns: ColumnsConfig) -> Examples:
    """Read a file or a folder of examples.

    Raises:
        DataError: it cannot be read, a column is missing, or a value is no text, is empty or has no label.
    """
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[str] = []
    for row, record in enumerate(_records(location), start=1):
        texts.append(_text(location, row, record, columns.text))
        if columns.pair is not None:
            pairs.append(_text(location, row, record, columns.pair))
        labels.append(_label(location, row, record, columns.label))
    if not texts:
        raise DataError(f"{location} holds no example", "one or more", "check the file")
    return Examples(location, texts, pairs if columns.pair is not None else None, labels)


def find_labels(examples: Examples) -> tuple[str, ...]:
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


def require_examples_of(labels: tuple[str, ...], examples: Examples, numbers: list[int]) -> None:
    """Raise `DataError` where a label has no example in the training data."""
    absent = [name for number, name in enumerate(labels) if number not in {*numbers}]
    if absent:
        raise DataError(
            f"{examples.location} has no example of label {', '.join(absent)}",
            "examples of every label in objective.labels",
            "leave the label out, or add examples of it",
        )


def _records(location: str) -> Iterator[Mapping[str, Any]]:
    path = Path(location)
    if path.is_dir():
        return _saved_dataset(path)
    plain = path.with_suffix("") if path.suffix.lower() in text_files.SUFFIXES else path
    ending = plain.suffix.lower().removeprefix(".")
    if ending in ("jsonl", "json"):
        return _json_lines(location)
    if ending in ("csv", "tsv"):
        return _separated(location, "," if ending == "csv" else "\t")
    if ending == "parquet":
        return _parquet(location)
    raise DataError(
        f"{location} is of no format that examples are read from",
        f"a file that ends in {', '.join(FORMATS)} (and .gz, .zst, .bz2 or .xz), or a folder of save_to_disk",
        "convert it, or rename it after what it holds",
    )


def _json_lines(location: str) -> Iterator[Mapping[str, Any]]:
    for number, line, _ in text_files.lines(location):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {location} is no JSON: {error}", "an object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"line {number} of {location} is {type(record).__name__}", "an object of columns")
        yield record


def _separated(location: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
    ((_, content, _),) = text_files.whole(location)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{location} is not UTF-8 at byte {error.start}", "UTF-8", "convert it, with iconv say"
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"line {reader.line_num} of {location} has another number of fields than its first line",
                    f"{len(reader.fieldnames or ())} fields",
                    "quote fields that hold the separator",
                )
            yield record
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num + 1} of {location}: {error}", "well-formed rows", "mend the row"
        ) from error


def _parquet(location: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(location) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{location} cannot be read: {error}", "a whole Parquet file", "check the file") from error


def _saved_dataset(folder: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever it meets
        raise DataError(
            f"{folder} cannot be read as a data set: {(str(error).splitlines() or [''])[0]}",
            "a folder that datasets' save_to_disk wrote",
            "name one of its splits, or a file",
        ) from error
    if isinstance(found, datasets.DatasetDict):
        splits = [str(name) for name in found]
        raise DataError(
            f"{folder} holds several splits", f"one of them: {', '.join(splits)}", f"name {folder}/{splits[0]}"
        )
    labels = {
        name: feature.names for name, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    for row in found:
        record: dict[str, Any] = dict(row)  # pyright: ignore[reportArgumentType, reportCallIssue]
        # a label's name says more than its number
        record |= {key: names[record[key]] for key, names in labels.items() if record[key] in range(len(names))}
        yield record


def _text(location: str, row: int, record: Mapping[str, Any], column: str) -> str:
    value = _value(location, row, record, column)
    if not isinstance(value, str) or not value.strip():
        what = "no text" if not isinstance(value, str) else "an empty text"
        raise DataError(
            f"row {row} of {location} has {what} in column {column!r}: {value!r:.60}", "text", "mend or drop the row"
        )
    return value


def _label(location: str, row: int, record: Mapping[str, Any], column: str) -> str:
    value = _value(location, row, record, column)
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise DataError(
        f"row {row} of {location} has label {value!r:.60} in column {column!r}",
        "text or a number",
        "mend or drop the row",
    )


def _value(location: str, row: int, record: Mapping[str, Any], column: str) -> Any:
    if column not in record:
        raise DataError(
            f"row {row} of {location} has no column {column!r}",
            ", ".join(map(repr, record)) or "columns",
            "name the columns in data.columns (text, pair, label)",
        )
    return record[column]
