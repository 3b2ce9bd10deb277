"""A folder on the local disk that keeps files of a remote data set, never more bytes than its limit.

All processes of a node share it; who needs a file that another is fetching waits for that one. Every promise that must
end with a process is a lock on an open file (flock), which the system takes back however the process dies:

- `.lock` is held for the moment in which room is made and a file claimed;
- `NAME.partial`, locked exclusively, is being fetched; unlocked, it was left by a process that died, and goes;
- `NAME`, locked shared, is in use, and is never evicted. It is put in place in one move, when its content is verified.

Invariant: the sizes of all files add up to the limit at most; a claim takes its whole size at once. What a file is
called and when it is right is the business of `engine.data.shards.remote`. The folder must lie on a disk of this node.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from engine.errors import DataError

PARTIAL = ".partial"
LOCK = ".lock"
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.05, 2.0
_PATIENCE_SECONDS = 600.0
"""How long a full cache is waited for: as long as other ranks take to end their step, at the most."""


class ShardCache:
    """Files of one folder, within a limit."""

    def __init__(self, folder: Path, limit_bytes: int, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises `DataError` where the folder cannot be made."""
        self.folder, self.limit_bytes, self._sleep = folder, limit_bytes, sleep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOCK).touch()
        except OSError as error:
            raise DataError(
                f"the cache {folder} cannot be made: {error.strerror}", "a writable folder", "change data.cache.folder"
            ) from error

    def open(self, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file, held until it is closed; `fetch` writes and verifies it where it is not there.

        Raises:
            DataError: what `fetch` raises; or there is no room, since all that is there is in use.
        """
        waited, pause = 0.0, _FIRST_WAIT_SECONDS
        while True:
            found = self.open_now(name, num_bytes, fetch)
            if found is not None:
                return found
            if self._wait_for_fetch(name):
                continue
            if waited >= _PATIENCE_SECONDS:
                raise DataError(
                    f"the cache {self.folder} has had no room for {num_bytes:,} bytes for {waited:.0f} seconds: all "
                    "that it holds is in use",
                    f"data.cache.bytes above {self.limit_bytes:,}",
                    "make it larger: two windows of shards, and one more for ranks that are ahead",
                )
            self._sleep(pause)
            waited, pause = waited + pause, min(2 * pause, _LONGEST_WAIT_SECONDS)

    def open_now(self, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """As `open`, but None where another process is fetching the file or there is no room."""
        while True:
            if (held := self._hold(name)) is not None:
                return held
            claimed = self._claim(name, num_bytes)
            if claimed is None:
                if (self.folder / name).exists():
                    continue  # placed in between
                return None
            return self._fetch(name, claimed, fetch)

    def discard(self, name: str) -> None:
        """Takes a file out, whoever holds it: it has been damaged on this disk."""
        (self.folder / name).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Bytes of all files, those that are being fetched with their whole size."""
        with self._alone():  # or a file that is put in place meanwhile counts twice
            return self._used_bytes()

    def _used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _hold(self, name: str) -> BinaryIO | None:
        """The file under a shared lock; None where it is not there."""
        try:
            file = (self.folder / name).open("rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # evicted between the two calls
            file.close()
            return None
        os.utime(self.folder / name)  # what was used last is evicted last
        return file

    def _fetch(self, name: str, file: BinaryIO, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        partial = self.folder / (name + PARTIAL)
        try:
            fetch(file)
            file.flush()
            os.fsync(file.fileno())
            with self._alone():
                partial.rename(self.folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        return file

    def _claim(self, name: str, num_bytes: int) -> BinaryIO | None:
        """The partial file, locked exclusively and of its whole size; None where another has it or there is no room."""
        if num_bytes > self.limit_bytes:
            raise DataError(
                f"the cache {self.folder} holds {self.limit_bytes:,} bytes, a shard has {num_bytes:,}",
                f"data.cache.bytes of {num_bytes:,} or more",
                "make it larger",
            )
        with self._alone():
            if (self.folder / name).exists():
                return None
            partial = self.folder / (name + PARTIAL)
            self._sweep()
            if partial.exists() or not self._make_room(num_bytes):
                return None
            file = partial.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(num_bytes)
            return file

    def _wait_for_fetch(self, name: str) -> bool:
        """Returns when nobody is fetching the file any more; false where nobody was."""
        try:
            with (self.folder / (name + PARTIAL)).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return True
        except FileNotFoundError:
            return False

    def _sweep(self) -> None:
        """Removes what processes left that died while they fetched."""
        for path in self.folder.glob("*" + PARTIAL):
            _remove_unheld(path)

    def _make_room(self, num_bytes: int) -> bool:
        """Evicts what is not in use, longest unused first, until `num_bytes` fit; whether they do."""
        left = self.limit_bytes - num_bytes - self._used_bytes()
        for path, size, _ in sorted(self._files(), key=lambda item: item[2]):
            if left >= 0:
                break
            if path.suffix != PARTIAL:
                left += size * _remove_unheld(path)
        return left >= 0

    def _files(self) -> list[tuple[Path, int, int]]:
        """(path, bytes, when last used) of every file."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name != LOCK:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((Path(entry.path), status.st_size, status.st_mtime_ns))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _remove_unheld(path: Path) -> bool:
    """Removes a file that nobody holds; whether it did."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
