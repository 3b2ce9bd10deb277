"""One text column of a Parquet file, row by row, as bytes, and on request the values of other columns.

Errors of the library become one `DataError` with the file's name.

Decoding is the business of `engine.corpus.sources.chunks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.shards.open_shards import too_many_files
from engine.errors import DataError

_ROWS_AT_ONCE = 1024

RawDocument = tuple[int, bytes, int]
"""Number of the row (from 0), its text, and bytes of the file that were read so far."""


def rows(name: str, column: str, others: tuple[str, ...] = ()) -> Iterator[tuple[RawDocument, dict[str, Any]]]:
    """Yield the texts of a column in order, and the values of other columns by name.

    Raises `DataError`: damaged, no such column, no text in it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(name) as file:
            _check_column(name, file.schema_arrow, column)
            for other in others:
                _check_other_column(name, file.schema_arrow, other)
            columns = [column, *others]
            size, total, number = Path(name).stat().st_size, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                # `columns` also takes what it reads as a path: of "a.b", field b of a struct a
                found = _values(batch, others)
                for text, value in zip(
                    _as_bytes(batch.column(batch.schema.get_field_index(column))), found, strict=True
                ):
                    if text is None:
                        raise DataError(f"row {number} of {name} has no text in column {column!r}", "text", "mend it")
                    number += 1
                    yield (number - 1, text, size * number // total), value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and (problem := too_many_files(error)):
            raise problem from error
        raise DataError(
            f"{name} cannot be read as Parquet: {error}", "a whole Parquet file", "fetch or write it again"
        ) from error


def _as_bytes(column) -> list[bytes | None]:
    """Return texts as they are stored: files that other programs wrote may hold strings that are no UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_view = pyarrow.types.is_string_view(column.type)
    # a cast to binary does not decode; large_binary takes strings of either offset width, views need views
    return column.cast(pyarrow.binary_view() if is_view else pyarrow.large_binary()).to_pylist()


def _values(batch, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    found = [batch.column(batch.schema.get_field_index(column)).to_pylist() for column in columns]
    if not columns:
        return [{}] * batch.num_rows
    return [dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)]


def _check_other_column(name: str, schema, column: str) -> None:
    if schema.get_field_index(column) < 0:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{name} has no column {column!r}", found, "name the column with --id-key or --weight-key")


def _check_column(name: str, schema, column: str) -> None:
    import pyarrow

    position = schema.get_field_index(column)
    kind = None if position < 0 else schema.field(position).type
    if kind is not None and pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if kind is None or not any(test(kind) for test in tests):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{name} has no text in a column {column!r}", found, "name it with --text-key")
