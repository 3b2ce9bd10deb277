"""One text column of a Hugging Face dataset, streamed: from the hub, a local folder, or one saved to disk.

Order is the dataset's own; nothing is downloaded whole. Every exception of the library and of the readers below it
becomes one `DataError`: they raise what they please (an `EOFError` of a truncated gzip file, a `RuntimeError` of an
empty one, pandas' and pyarrow's own classes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.config.paths import expand
from engine.errors import ConfigError, DataError, PalimpsestError

HUB_PREFIX = "hf:"
"""A source `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]` is read through Hugging Face datasets; SPLIT is `train` by default."""

_SAVED_TO_DISK = "state.json"
_SAVED_SPLITS = "dataset_dict.json"


def read_columns(source: str, column: str, others: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the texts of `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]` in order, and the values of other columns by name
    (None where they are not there). Raises `DataError`."""
    path, config, split = split_hub_name(source)
    number = -1
    try:
        columns = [column, *others]
        for number, row in enumerate(_rows(path, config, split, columns)):
            if not isinstance(row.get(column), str):
                found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
                raise DataError(
                    f"row {number} of {source} has no text in column {column!r}", found, "name it with --text-key"
                )
            yield row[column], {other: row.get(other) for other in others}
    except PalimpsestError:
        raise
    except Exception as error:
        after = f" after row {number}" if number >= 0 else ""
        raise DataError(
            f"dataset {source} cannot be read{after}: {_reason(error)}",
            "a dataset on the hub, a folder of one, or one saved to disk, of whole files with the same columns; @SPLIT "
            "one of its splits",
            "check the name, the config, the split, the network and the files",
        ) from error


def _reason(error: Exception) -> str:
    return f"{error}".strip() or type(error).__name__


def local_files(source: str) -> list[Path]:
    """Return the files of a local dataset, sorted; none of one on the hub."""
    folder = Path(split_hub_name(source)[0])
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def split_hub_name(name: str) -> tuple[str, str | None, str]:
    """Return (name or folder, config or None, split) of a source `hf:...`. Raises `ConfigError` without a name."""
    rest, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    path, _, config = rest.partition(":")
    if not path:
        raise ConfigError(f"source {name!r} names no dataset", "hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]", "name one")
    return expand(path), config or None, split or "train"


def _rows(path: str, config: str | None, split: str, columns: list[str]) -> Iterable[dict[str, Any]]:
    import datasets

    if (Path(path) / _SAVED_TO_DISK).is_file():
        return datasets.load_from_disk(path)  # pyright: ignore[reportReturnType]
    if (Path(path) / _SAVED_SPLITS).is_file():
        return datasets.load_from_disk(path)[split]  # pyright: ignore[reportReturnType]
    builder: Any = datasets.load_dataset_builder(path, config)
    _read_alone(builder, columns)
    return builder.as_streaming_dataset(split=split)


def _read_alone(builder: Any, columns: list[str]) -> None:
    """Keep some columns of each table that a builder reads, where it has them.

    A builder takes the types of all columns from the first table that it reads, and casts the others to them. So a
    number that turns into a string after a hundred thousand rows ends the reading, in a column that nobody asked for,
    and selecting a column afterwards is too late: `_cast_table` is where every builder of the library casts.
    """
    cast = builder._cast_table

    def select(table: Any, *arguments: Any, **options: Any) -> Any:
        has_all = set(columns) <= set(table.column_names)
        return table.select(columns) if has_all else cast(table, *arguments, **options)

    builder._cast_table = select
    features = builder.info.features
    if features is not None and set(columns) <= set(features):
        builder.info.features = type(features)({column: features[column] for column in columns})
