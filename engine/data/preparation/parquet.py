"""One text column of a Parquet file, row by row. Errors of the library become one `DataError` that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.errors import DataError

_ROWS_AT_ONCE = 1024

Piece = tuple[int, bytes, int]
"""Number of the row (from 0), its text, and bytes of the file that were read so far."""


def rows(name: str, column: str) -> Iterator[Piece]:
    """The texts of a column in order. Raises `DataError`: damaged, no such column, no text in it."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(name) as file:
            _check_column(name, file.schema_arrow, column)
            size, total, number = Path(name).stat().st_size, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise DataError(f"row {number} of {name} has no text in column {column!r}", "text", "mend it")
                    number += 1
                    yield number - 1, text.encode(), size * number // total
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{name} cannot be read as Parquet: {error}", "a whole Parquet file", "fetch or write it again"
        ) from error


def _check_column(name: str, schema, column: str) -> None:
    import pyarrow

    position = schema.get_field_index(column)
    kind = None if position < 0 else schema.field(position).type
    if kind is not None and pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{name} has no text in a column {column!r}", found, "name it with --text-key")
