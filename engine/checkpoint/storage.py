"""Locations of checkpoints: a local folder, or one behind a URL that fsspec knows (s3://, gs://, ...).

`Remote` has the part of `pathlib.Path` that reading uses, so the rest of this package need not know which of both it
holds. Checkpoints are saved to a shared file system: a rename is atomic there, and a commit is a rename.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

from engine.config.paths import expand
from engine.errors import CheckpointError

MANIFEST = "manifest.json"


class Remote:
    """A file or folder behind an fsspec URL. What its file system raises comes as `OSError`."""

    def __init__(self, file_system: Any, path: str) -> None:
        self._fs, self._path = file_system, path.rstrip("/")

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self._fs, self._path.rpartition("/")[0])

    def __truediv__(self, name: str) -> Remote:
        return Remote(self._fs, f"{self._path}/{name}")

    def __str__(self) -> str:
        return self._fs.unstrip_protocol(self._path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def is_dir(self) -> bool:
        with _os_errors():
            return self._fs.isdir(self._path)

    def is_file(self) -> bool:
        with _os_errors():
            return self._fs.isfile(self._path)

    def iterdir(self) -> Iterator[Remote]:
        with _os_errors():
            names = {item.rstrip("/").rpartition("/")[2] for item in self._fs.ls(self._path, detail=False)}
        return (self / name for name in sorted(names))

    def stat(self) -> SimpleNamespace:
        with _os_errors():
            return SimpleNamespace(st_size=int(self._fs.info(self._path)["size"]))

    def open(self, mode: str) -> Any:
        assert mode == "rb", "remote checkpoints are read"
        with _os_errors():
            return self._fs.open(self._path, "rb")

    def read_text(self, encoding: str) -> str:
        with _os_errors():
            return self._fs.cat_file(self._path).decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop).

        Raises:
            OSError: fewer bytes came.
            CheckpointError: the server gives whole files whatever is asked for, as simple HTTP servers do.
        """
        with _os_errors():
            content = self._fs.cat_file(self._path, start=start, end=stop)
        # A plain HTTP server ignores the header Range and answers 200 with the whole file.
        if len(content) > stop - start:
            raise CheckpointError(
                f"{self}: asked for {stop - start} bytes of it, the server sends all {len(content)}",
                "a server that answers requests for ranges of bytes",
                "copy the checkpoint to a disk, or let another server hand it out; `list` and `verify` need no ranges",
            )
        # fsspec returns what there is where a file is shorter than it was said to be.
        if len(content) != stop - start:
            raise OSError(errno.EIO, f"asked for bytes {start} to {stop}, {len(content)} came")
        return content

    def remove_tree(self) -> None:
        """Remove a checkpoint, its manifest first: what is left when this is cut short is no checkpoint."""
        with _os_errors():
            if self._fs.exists(f"{self._path}/{MANIFEST}"):
                self._fs.rm_file(f"{self._path}/{MANIFEST}")
            if self._fs.exists(self._path):
                self._fs.rm(self._path, recursive=True)


Location = Path | Remote
"""Location of a checkpoint, or of a folder of them."""


def location_of(text: str) -> Location:
    """Return the location that a path or a URL names.

    Raises:
        CheckpointError: there is no file system for this URL.
    """
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        path = Path(unquote(urlsplit(text).path) if scheme else expand(text))
        return path if path.name not in ("", "..") else path.resolve()  # names carry meaning here
    # Imported here: most runs have local folders alone, and the import takes a while.
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"{text}: {error}",
            "a path, or a URL that fsspec can open",
            "install the package that it names, or copy the checkpoint to a disk",
        ) from error
    return Remote(file_system, path)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turn whatever a file system's library raises into `OSError`: each library has classes of its own."""
    try:
        yield
    # kept as it is: FileNotFoundError means something to the callers
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
