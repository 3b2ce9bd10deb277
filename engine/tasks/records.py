"""Rows of files as people keep examples: JSON lines, CSV, Parquet, or a folder that Hugging Face's datasets saved.

Every error names the file, the row and the column. Rows are numbered from 1, as editors and spreadsheets do.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.corpus.sources import text_files
from engine.errors import DataError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Endings of the files, compressed ones (`text_files.SUFFIXES`) having another one behind it."""


def read_records(location: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file or a folder. Raises `DataError` where it cannot be read."""
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
    labels = {name: names for name, feature in found.features.items() if (names := _names(feature)) is not None}
    for row in found:
        record: dict[str, Any] = dict(row)  # pyright: ignore[reportArgumentType, reportCallIssue]
        # a label's name says more than its number
        record |= {key: _named(record[key], names) for key, names in labels.items()}
        yield record


def _names(feature: Any) -> list[str] | None:
    """Return the names of a column of labels, or of lists of them; None for another column."""
    import datasets

    # `Sequence(ClassLabel)` and, in newer versions of the library, `List(ClassLabel)`
    inner = getattr(feature, "feature", feature)
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value in range(len(names)) else value


def text_of(location: str, row: int, record: Mapping[str, Any], column: str) -> str:
    """Return the text that a row has in a column. Raises `DataError` where it has none, or an empty one."""
    value = value_of(location, row, record, column)
    if not isinstance(value, str) or not value.strip():
        what = "no text" if not isinstance(value, str) else "an empty text"
        raise DataError(
            f"row {row} of {location} has {what} in column {column!r}: {value!r:.60}", "text", "mend or drop the row"
        )
    return value


def label_of(location: str, row: int, record: Mapping[str, Any], column: str) -> str:
    """Return the label that a row has in a column, as text: a whole number without its fraction.

    Raises:
        DataError: it has none, or something that is neither text nor a number.
    """
    value = value_of(location, row, record, column)
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise DataError(
        f"row {row} of {location} has label {value!r:.60} in column {column!r}",
        "text or a number",
        "mend or drop the row",
    )


def value_of(location: str, row: int, record: Mapping[str, Any], column: str) -> Any:
    """Return what a row has in a column. Raises `DataError` where there is no such column."""
    if column not in record:
        raise DataError(
            f"row {row} of {location} has no column {column!r}",
            ", ".join(map(repr, record)) or "columns",
            "name the columns in data.columns",
        )
    return record[column]
