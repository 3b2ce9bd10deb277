"""A folder that is there whole or not at all: written beside its final path, and renamed at the end.

While it is written, a lock on it keeps a second writer away. A process that is killed leaves the folder without a
holder of the lock; the next writer removes what is in it, or goes on with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.atomic import sync_folder
from engine.errors import ConfigError, EnvironmentProblem


@contextmanager
def new_folder(output: Path, resumable: bool = False) -> Iterator[Path]:
    """Yield a folder beside `output` that is renamed to it when the block ends well, and removed after an error.

    It is empty, but with `resumable`: then it has what a killed process left there, and stays when this one is
    interrupted, too.

    Raises:
        ConfigError: `output` holds something, or another process is writing it.
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
    interrupted = False
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, output):
            try:
                if not resumable:
                    _clear(partial)
                yield partial
                if output.is_dir():
                    # empty, as checked; a folder that has been filled meanwhile stays, and this raises
                    output.rmdir()
                partial.rename(output)
                sync_folder(output.resolve().parent)
            except KeyboardInterrupt:
                interrupted = True
                raise
            finally:
                # after the rename there is nothing of this name
                if not (interrupted and resumable):
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise _unwritable(output, error) from error


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other conversions from writing files at a path, such as a prefix of several, while the block runs.

    Raises:
        ConfigError: another process is writing there.
        EnvironmentProblem: it cannot be written.
    """
    beside = output.resolve().with_name(f".{output.resolve().name}.partial")
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error) from error
    with _locked(beside, output):
        try:
            yield
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _unwritable(output: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{output} cannot be written: {error.strerror or error}",
        "a writable folder with room",
        "make room, or choose another folder",
    )


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises `ConfigError` where another process holds it."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # one that has just ended may have removed the folder between its opening here and the lock
            if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise ConfigError(
                f"output {output} is being written by another process",
                "one conversion to one place at a time",
                "wait for it, or choose another folder",
            ) from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # file systems over a network that lock no folders: there nobody is kept away
        yield
    finally:
        os.close(descriptor)


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
