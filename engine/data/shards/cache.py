"""A folder on the local disk that keeps files of a remote data set, never more bytes than its limit.

All processes of a node share it; who needs a file that another is fetching waits for that one. Every promise that must
end with a process is a lock on an open file (flock), which the system takes back however the process dies:

- `.lock` is held for the moment in which room is made and a file reserved;
- `NAME.partial`, locked exclusively, is being fetched; unlocked, it was left by a process that died, and goes;
- `NAME`, locked shared, is in use, and is never evicted. It is put in place in one move, when its content is verified.

Invariants: the sizes of all files add up to the limit at most; room is taken for a whole file at once, on disk, too.
Nobody waits for room while it holds a file (`before_wait`), and a fetch waits for nothing but the store, so processes
that share the folder never wait for each other for ever, however small the limit is. What a file is called and when it
is right is the business of `engine.data.shards.remote`. The folder must lie on a disk of this node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from engine.data.shards.open_shards import too_many_files
from engine.errors import DataError

PARTIAL = ".partial"
LOCK = ".lock"
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.05, 2.0
_PATIENCE_SECONDS = 600.0
"""Seconds that a full cache is waited for: at the most what other ranks take to end their step."""
_UNTOUCHED_NS = 10**18
"""Time of the last change of a file that nobody wrote to since it was put in place (2001-09-09). Any write sets another
one, however soon it comes, so a changed file is told from the one that was verified."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardCache:
    """Files of one folder, within a limit."""

    def __init__(self, folder: Path, limit_bytes: int, sleep: Callable[[float], None] = time.sleep) -> None:
        """Make the folder. Raises `DataError` where it cannot be made."""
        self.folder, self.limit_bytes, self._sleep = folder, limit_bytes, sleep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOCK).touch()
        except OSError as error:
            raise DataError(
                f"the cache {folder} cannot be made: {error.strerror}", "a writable folder", "change data.cache.folder"
            ) from error

    def open(
        self,
        name: str,
        num_bytes: int,
        fetch: Callable[[BinaryIO], None],
        before_wait: Callable[[], None] = lambda: None,
    ) -> BinaryIO:
        """Return the file, held until it is closed; `fetch` writes and verifies it where it is not there.

        `before_wait` is called before the process waits for room: it closes the files that the process holds.

        Raises:
            DataError: what `fetch` raises; the disk is full; or there is no room, since all that is there is in use.
        """
        waited, pause = 0.0, _FIRST_WAIT_SECONDS
        while True:
            found = self.open_now(name, num_bytes, fetch)
            if found is not None:
                return found
            # somebody was fetching it, and has finished or failed: look again
            if self._wait_for_fetch(name):
                continue
            if waited >= _PATIENCE_SECONDS:
                raise DataError(
                    f"the cache {self.folder} has had no room for {num_bytes:,} bytes for {waited:.0f} seconds: all "
                    "that it holds is in use",
                    f"data.cache.bytes above {self.limit_bytes:,}",
                    "make it larger: two windows of shards, and one more for ranks that are ahead",
                )
            # or processes that hold files, each waiting for the others' room, would wait for ever
            before_wait()
            self._sleep(pause)
            waited, pause = waited + pause, min(2 * pause, _LONGEST_WAIT_SECONDS)

    def open_now(self, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """Return the file as `open` does, but None where another process is fetching the file or there is no room."""
        while True:
            with self._naming(num_bytes):
                if (held := self._hold(name)) is not None:
                    return held
                partial = self._make_partial(name, num_bytes)
                if partial is None:
                    if (self.folder / name).exists():
                        continue  # placed in between
                    return None
            return self._fetch(name, partial, num_bytes, fetch)

    def unwritable(self, error: OSError, num_bytes: int) -> DataError:
        """Return the error of a file of so many bytes that cannot be written into the cache."""
        if error.errno not in _FULL:
            return too_many_files(error) or DataError(
                f"the cache {self.folder} cannot be used: {error.strerror or error}",
                "a folder on a disk of this node that can be read and written",
                "look at the disk and the folder's rights, or change data.cache.folder",
            )
        try:
            free = os.statvfs(self.folder)
            left = f"{free.f_bavail * free.f_frsize:,} are free"
        except OSError:
            left = "it is full"
        return DataError(
            f"the disk of the cache {self.folder} has no room for a shard of {num_bytes:,} bytes: {left}",
            f"room for data.cache.bytes = {self.limit_bytes:,}",
            "free some of the disk, make data.cache.bytes smaller (two windows of shards at least), or change "
            "data.cache.folder",
        )

    def discard(self, name: str) -> None:
        """Take a file out, whoever holds it: it has been damaged on this disk."""
        (self.folder / name).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Return the bytes of all files, counting those that are being fetched with their whole size."""
        with self._alone():  # or a file that is put in place meanwhile counts twice
            return self._used_bytes()

    def _used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _hold(self, name: str) -> BinaryIO | None:
        """Return the file under a shared lock; None where it is not there."""
        try:
            file = (self.folder / name).open("rb", buffering=0)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # `_remove_unheld` may have held the lock that was waited for
        if not os.fstat(file.fileno()).st_nlink:  # evicted between the two calls
            file.close()
            return None
        status = os.fstat(file.fileno())
        with suppress(PermissionError):  # another user's file
            os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # what was used last is evicted last
        return file

    def _fetch(self, name: str, file: BinaryIO, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        partial = self.folder / (name + PARTIAL)
        try:
            fetch(file)
            with self._naming(num_bytes):
                file.flush()
                os.fsync(file.fileno())
                # used last now, and written to never again: see `_UNTOUCHED_NS`
                os.utime(file.fileno(), ns=(time.time_ns(), _UNTOUCHED_NS))
                with self._alone():
                    # under `.lock`, so that no other process counts or reserves it between the two names
                    partial.rename(self.folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        return file

    def _make_partial(self, name: str, num_bytes: int) -> BinaryIO | None:
        """Return the partial file, exclusively locked, at its whole size; None if another has it or no room is left."""
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
            # first, since what dead processes left takes room
            self._sweep()
            # a partial file that is still there after the sweep belongs to a living process
            if partial.exists() or not self._make_room(num_bytes):
                return None
            return self._reserve(partial, num_bytes)

    def _reserve(self, partial: Path, num_bytes: int) -> BinaryIO | None:
        """Return the partial file at its whole size on the disk, evicting unused files to make room. None where files
        are in use that may make room later.

        Raises:
            DataError: the disk is full, and no file of the cache takes any of it.
        """
        while True:
            file = partial.open("x+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                _allocate(file, num_bytes)
                return file
            except OSError as error:
                partial.unlink()
                file.close()
                if error.errno not in _FULL:
                    raise
                if not self._evict_one():
                    if not self._files():
                        raise self.unwritable(error, num_bytes) from error
                    return None

    def _evict_one(self) -> bool:
        """Evict the file that was unused for longest; return False if all are in use."""
        # `any` stops at the first that could be removed
        return any(_remove_unheld(path) for path, _, _ in self._by_use())

    def _wait_for_fetch(self, name: str) -> bool:
        """Wait until nobody is fetching the file any more; return False where nobody was."""
        try:
            with (self.folder / (name + PARTIAL)).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return True
        except FileNotFoundError:
            return False

    def _sweep(self) -> None:
        """Remove what processes left that died while they fetched."""
        for path in self.folder.glob("*" + PARTIAL):
            _remove_unheld(path)

    def _make_room(self, num_bytes: int) -> bool:
        """Evict unused files, the longest unused first, until `num_bytes` fit; return True if they do."""
        left = self.limit_bytes - num_bytes - self._used_bytes()
        for path, size, _ in self._by_use():
            if left >= 0:
                break
            left += size * _remove_unheld(path)
        return left >= 0

    def _by_use(self) -> list[tuple[Path, int, int]]:
        """Return (path, bytes, time of last use) of the files in place, the longest unused first."""
        return sorted((item for item in self._files() if item[0].suffix != PARTIAL), key=lambda item: item[2])

    def _files(self) -> list[tuple[Path, int, int]]:
        """Return (path, bytes, time of last use) of every file."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name != LOCK:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                # the access time is the one that `_hold` sets: reading sets none where a disk is mounted with noatime
                found.append((Path(entry.path), status.st_size, status.st_atime_ns))
        return found

    @contextmanager
    def _naming(self, num_bytes: int) -> Iterator[None]:
        """Turn an `OSError` inside into a `DataError` about the cache."""
        try:
            yield
        except OSError as error:
            raise self.unwritable(error, num_bytes) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Take the file's whole size on the disk now, so that no write of it finds the disk full. Raises `OSError`."""
    # truncate sets the size that `_used_bytes` adds up, posix_fallocate takes the blocks
    file.truncate(num_bytes)
    if num_bytes:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that has no such call
                raise


def _remove_unheld(path: Path) -> bool:
    """Remove a file unless somebody holds it; return True if it did."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # under the lock: who opened the file before it went finds no link left once the lock is theirs, and looks
            # again
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
