"""Writing of a tokenizer's folder as a whole: into a folder inside it first, then moved file by file.

A folder that cannot be written is found out before the text is read, since the inner folder is made at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import DataError

UNFINISHED = ".unfinished"
"""Folder of the files until all are written; left behind by a kill, it is removed by the next start."""


@contextmanager
def written_whole(folder: Path, replaced: tuple[str, ...] = ()) -> Iterator[Path]:
    """Give a folder to write into, whose files are moved into `folder` once the block has ended without an error.

    `replaced` are files of an earlier tokenizer that are removed unless they are written again. Raises `DataError`
    where `folder` cannot be written, before the block or after it.
    """
    inner = folder / UNFINISHED
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if inner.exists():
            shutil.rmtree(inner)
        inner.mkdir()
        yield inner
        for name in replaced:
            (folder / name).unlink(missing_ok=True)
        for path in sorted(inner.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    except Exception as error:
        if "(os error " not in str(error):  # how `tokenizers` tells what the system refused
            raise
        raise _unwritable(folder, str(error)) from error
    finally:
        shutil.rmtree(inner, ignore_errors=True)
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _unwritable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"cannot write the tokenizer to {folder}: {reason}",
        "a writable folder with room",
        "make room, or name another one",
    )
