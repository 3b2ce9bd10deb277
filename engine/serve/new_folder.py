"""A folder that is there whole or not at all: written beside its final path, and renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.atomic import sync_folder
from engine.errors import ConfigError, EnvironmentProblem


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output` that is renamed to it when the block ends well, and removed otherwise.

    What a killed process left there is removed first.

    Raises:
        ConfigError: `output` holds something.
        EnvironmentProblem: it cannot be written.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(
            f"output {output} exists and holds something already",
            "a new or empty folder",
            "name another, or remove it first",
        )
    # Beside it, so on the same file system: the rename at the end copies nothing.
    partial = output.resolve().with_name(f".{output.resolve().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.is_dir():
            # empty, as checked; a folder that has been filled meanwhile stays, and this raises
            output.rmdir()
        partial.rename(output)
        sync_folder(output.resolve().parent)
    except OSError as error:
        raise EnvironmentProblem(
            f"{output} cannot be written: {error.strerror or error}",
            "a writable folder with room",
            "name another --output",
        ) from error
    # after the rename there is nothing of this name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
