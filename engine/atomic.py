"""Atomic writes: a file is there whole or as it was before, for it is written beside its path and moved over it.

The content is on the disk before the move, and the move before the call returns: a crash of the machine leaves either
the old file or the new one. A writer that is killed leaves `.NAME.PROCESS.partial` behind, which the next writer of
the same file removes. Writers hold a lock on what they write, so a partial file that can be locked belongs to nobody.
"""

from __future__ import annotations

import fcntl
import glob
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put a file of this content (text as UTF-8) in place. Raises `OSError`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new binary file that takes the place of `path` when the block ends well, and is removed otherwise.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    sweep(path)
    # In the same folder, because a move is one step inside of a file system only; a name that no other writer has.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with _locked(partial) as file:
            yield file
            file.flush()
            # Before the move: a file system may write the name before the content, and a crash between them would leave
            # an empty file under that name.
            os.fsync(file.fileno())
            partial.replace(path)  # under the lock: from here on there is nothing that a sweep could find
    finally:
        partial.unlink(missing_ok=True)
    # The move is a change of the folder, which has to reach the disk as well.
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the folder's list of names is on the disk. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(partial: Path) -> BinaryIO:
    """Open a new file under a lock that ends with this process."""
    while True:
        file = partial.open("wb")
        with suppress(OSError):  # a file system without locks, where nothing is swept
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # swept between the two calls


def sweep(path: Path) -> bool:
    """Remove what killed writers of a file have left beside it; return True if there was something."""
    found = False
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # A lock that is held belongs to a live writer, here or on another node; its file stays.
        with suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
            found = True
    return found
