"""One text column of a Hugging Face dataset, streamed: from the hub, a local folder, or one saved to disk.

Order is the dataset's own; nothing is downloaded whole. Every exception of the library and of the readers below it
becomes one `DataError`: they raise what they please (an `EOFError` of a truncated gzip file, a `RuntimeError` of an
empty one, pandas' and pyarrow's own classes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.config.home import expand
from engine.errors import ConfigError, DataError, PalimpsestError

HUB_PREFIX = "hf:"
"""A source `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]` is read through Hugging Face datasets; SPLIT is `train` by default."""

_SAVED_TO_DISK = "state.json"
_SAVED_SPLITS = "dataset_dict.json"


def read_column(source: str, column: str) -> Iterator[str]:
    """The texts of `hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]` in order. Raises `DataError`."""
    path, config, split = split_hub_name(source)
    number = -1
    try:
        for number, row in enumerate(_rows(path, config, split)):
            if not isinstance(row.get(column), str):
                found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
                raise DataError(
                    f"row {number} of {source} has no text in column {column!r}", found, "name it with --text-key"
                )
            yield row[column]
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
    """The files of a local dataset, sorted; none of one on the hub."""
    folder = Path(split_hub_name(source)[0])
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def split_hub_name(name: str) -> tuple[str, str | None, str]:
    """(name or folder, config or None, split) of a source `hf:...`. Raises `ConfigError` where no name is left."""
    rest, _, split = name.removeprefix(HUB_PREFIX).partition("@")
    path, _, config = rest.partition(":")
    if not path:
        raise ConfigError(f"source {name!r} names no dataset", "hf:NAME_OR_FOLDER[:CONFIG][@SPLIT]", "name one")
    return expand(path), config or None, split or "train"


def _rows(path: str, config: str | None, split: str):
    import datasets

    if (Path(path) / _SAVED_TO_DISK).is_file():
        return datasets.load_from_disk(path)
    if (Path(path) / _SAVED_SPLITS).is_file():
        return datasets.load_from_disk(path)[split]
    return datasets.load_dataset(path, config, split=split, streaming=True)
