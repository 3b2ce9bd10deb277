"""Data sets at any URL that fsspec knows (s3://, gs://, https://, hdfs://, memory://, ...): whole files, fetched into a
cache, verified on arrival.

A fetch that fails is tried again, later and later; bytes that are not those of the index are fetched again, too, and
are damage only when the last attempt brought them. In the cache a file is called after its hash, so data sets that
share files share their place, and a changed file is another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import xxhash

from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.index import PREPARE_AGAIN, ArrayFile
from engine.errors import DataError
from engine.logs import logger

Result = TypeVar("Result")

_BLOCK_BYTES = 16 << 20
_log = logger(__name__)


def is_remote(location: str) -> bool:
    """Whether a data folder is a URL."""
    return "://" in location


@dataclass(frozen=True)
class Retry:
    """Attempts, and the pauses between them, each twice the one before."""

    attempts: int = 6
    first_pause_seconds: float = 0.5
    sleep: Callable[[float], None] = time.sleep

    def run(self, action: Callable[[], Result], url: str) -> Result:
        """The result of the first attempt that succeeds.

        Raises:
            DamagedShard: there is no such file, or every attempt brought other bytes than were written.
            DataError: the last attempt failed, with its reason.
        """
        pause = self.first_pause_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except FileNotFoundError as error:
                raise DamagedShard(f"{url} is missing", "every file that the index names", PREPARE_AGAIN) from error
            except Exception as error:  # every file system has exceptions of its own
                if attempt == self.attempts:
                    if isinstance(error, DamagedShard):
                        raise
                    raise DataError(
                        f"{url} cannot be fetched, {attempt} attempts: {type(error).__name__}: {error}",
                        "a store that answers",
                        "check the address, the credentials and the network, then train again: the run resumes",
                    ) from error
                _log.warning("%s: attempt %d of %d failed: %s", url, attempt, self.attempts, error)
            self.sleep(pause)
            pause *= 2
        raise AssertionError("no attempt was allowed")


class RemoteFolder:
    """The files of a data set at a URL, through a cache."""

    def __init__(self, url: str, cache: ShardCache, retry: Retry | None = None) -> None:
        """Reads nothing. Raises `DataError` where no file system is known for the URL."""
        import fsspec  # with what it brings along, not for who reads a local folder

        self.url, self.cache, self._retry = url.rstrip("/"), cache, retry or Retry()
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"no file system for {url}: {error}", "a protocol that fsspec knows", "install its package"
            ) from error

    def read(self, name: str) -> bytes:
        """A small file, not cached. Raises as `Retry.run`."""
        return self._retry.run(lambda: bytes(self._system.cat_file(self._path(name))), f"{self.url}/{name}")

    def open(self, array: ArrayFile) -> tuple[str, BinaryIO]:
        """An array's file in the cache: its name there, and the file that keeps it there until it is closed.

        Raises:
            DamagedShard: it is missing, or not what was written, also when it is fetched again.
            DataError: it cannot be fetched, or the cache has no room.
        """
        name, num_bytes, fetch = self._wanted(array)
        return name, self.cache.open(name, num_bytes, fetch)

    def fetch_ahead(self, array: ArrayFile) -> None:
        """Brings a file into the cache, if there is room and nobody else is at it. Raises as `open`."""
        held = self.cache.open_now(*self._wanted(array))
        if held is not None:
            held.close()

    def _wanted(self, array: ArrayFile) -> tuple[str, int, Callable[[BinaryIO], None]]:
        xxh3 = array.xxh3 if array.compressed is None else array.compressed.xxh3
        url = f"{self.url}/{array.file}"

        def fetch(file: BinaryIO) -> None:
            self._retry.run(lambda: self._download(array.file, xxh3, array.stored_bytes, file), url)

        return f"{xxh3}{PurePosixPath(array.file).suffix}", array.stored_bytes, fetch

    def _download(self, name: str, xxh3: str, num_bytes: int, target: BinaryIO) -> None:
        """Writes a file whole. Raises `DamagedShard` where it is not what the index says."""
        digest, found = xxhash.xxh3_128(), 0
        target.seek(0)
        source: Any = self._system.open(self._path(name), "rb", cache_type="none")
        with source:
            while block := source.read(_BLOCK_BYTES):
                found += len(block)
                if found > num_bytes:  # not a byte more than was claimed
                    break
                digest.update(block)
                target.write(block)
        if found != num_bytes:
            what = "truncated" if found < num_bytes else "longer than it was written"
            raise DamagedShard(f"{self.url}/{name} is {what}", f"{num_bytes:,} bytes", PREPARE_AGAIN)
        if digest.hexdigest() != xxh3:
            raise DamagedShard(
                f"{self.url}/{name} is damaged: its bytes have xxh3 {digest.hexdigest()}", f"xxh3 {xxh3}", PREPARE_AGAIN
            )

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
