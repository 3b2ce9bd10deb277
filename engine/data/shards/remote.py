"""Data sets at any URL that fsspec knows (s3://, gs://, https://, hdfs://, memory://, ...): whole files, fetched into a
cache, verified on arrival.

A fetch that fails is tried again, later and later; bytes that are not those of the index are fetched again, too.
Invariant: a shard is missing or damaged only where the store itself says so. It is missing where the answer is that
there is no such file, and damaged where two attempts in a row brought the same wrong bytes. A store that is busy, out
of reach, that refuses, redirects, or answers with a web page is trouble of the store, and no reason to do without a
shard. In the cache a file is called after its hash, so data sets that share files share their place, and a changed file
is another one.
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
from engine.data.shards.folders import PARTS
from engine.data.shards.index import FILE as INDEX
from engine.data.shards.index import PREPARE_AGAIN, ArrayFile
from engine.errors import DataError
from engine.logs import logger

Result = TypeVar("Result")

_BLOCK_BYTES = 16 << 20
_HEAD_BYTES = 512
_MISSING = (404, 410)
"""Status codes of http for a file that is not there, or not any longer."""
_log = logger(__name__)


def is_remote(location: str) -> bool:
    """Return True if a data folder is a URL."""
    return "://" in location


@dataclass(frozen=True)
class Retry:
    """Attempts, and the pauses between them, each twice the one before."""

    attempts: int = 6
    first_pause_seconds: float = 0.5
    sleep: Callable[[float], None] = time.sleep

    def run(self, action: Callable[[], Result], url: str) -> Result:
        """Return the result of the first attempt that succeeds.

        Raises:
            MissingFile: the store says that there is no such file.
            DamagedShard: the last two attempts brought the same bytes, and they are not those that were written.
            DataError: the last attempt failed, with its reason; or what is wrong is not the store.
        """
        pause, wrong = self.first_pause_seconds, None
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as raised:  # every file system has exceptions of its own
                error = told_by_store(raised)
                if isinstance(error, FileNotFoundError):
                    raise MissingFile(f"{url} is missing", "every file that the index names", PREPARE_AGAIN) from error
                # a full disk, for one, which no further attempt makes larger
                if isinstance(error, DataError) and not isinstance(error, DamagedShard):
                    raise
                if attempt == self.attempts:
                    # the same wrong bytes twice in a row are what the store holds; different ones are damage on the way
                    if isinstance(error, DamagedShard) and (attempt == 1 or wrong == error.wrong):
                        raise
                    raise _unreachable(url, attempt, error) from error
                wrong = error.wrong if isinstance(error, DamagedShard) else None
                _log.warning("%s: attempt %d of %d failed: %s", url, attempt, self.attempts, error)
            self.sleep(pause)
            pause *= 2
        raise AssertionError("no attempt was allowed")


class MissingFile(DamagedShard):
    """A store says that there is no such file."""


def told_by_store(error: Exception) -> Exception:
    """Return the error behind one of fsspec's, which raises `FileNotFoundError` for anything that goes wrong while it
    asks for a file's size over http (as do others for a bucket that is elsewhere, or was mistyped).

    A `FileNotFoundError` is returned only where the store's own answer was that there is no such file.
    """
    cause = error.__cause__
    # a LookupError as the cause is a file system in memory or an archive saying that it has no such name
    if not isinstance(error, FileNotFoundError) or cause is None or isinstance(cause, LookupError):
        return error
    if not isinstance(cause, Exception):
        # asyncio.CancelledError, for one, is no Exception: reported as an OSError, it is tried again
        return OSError(repr(cause))
    response = getattr(cause, "response", None)
    if isinstance(response, dict):  # botocore's: a code of S3's, or where there is no body the status
        code = str(response.get("Error", {}).get("Code", ""))
        return error if code in ("NoSuchKey", *map(str, _MISSING)) else cause
    if getattr(cause, "status", None) in _MISSING:
        return error
    found = told_by_store(cause)
    return error if isinstance(found, FileNotFoundError) else found


def _unreachable(url: str, attempts: int, error: Exception) -> DataError:
    if isinstance(error, DamagedShard):
        reason = f"{error.wrong}; the attempt before brought something else"
    else:
        reason = f"{type(error).__name__}: {error}"
    status = getattr(error, "status", None)
    refused = isinstance(error, PermissionError) or status in (401, 403)
    return DataError(
        f"{url} cannot be fetched, {attempts} attempts: {reason}",
        "a store that answers",
        ("check the credentials and their rights" if refused else "check the address, the credentials and the network")
        + ", then train again: the run resumes",
    )


class RemoteFolder:
    """The files of a data set at a URL, through a cache."""

    def __init__(self, url: str, cache: ShardCache, retry: Retry | None = None) -> None:
        """Read nothing yet. Raises `DataError` where no file system is known for the URL."""
        import fsspec  # with what it brings along, not for who reads a local folder

        self.url, self.cache, self._retry = url.rstrip("/"), cache, retry or Retry()
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # every file system has exceptions of its own
            raise DataError(
                f"no file system for {url}: {error}",
                "a protocol that fsspec knows",
                "check how the URL begins (s3://, gs://, https://, ...), or install the protocol's package",
            ) from error

    def read(self, name: str) -> bytes:
        """Return the content of a small file, not cached. Raises as `Retry.run`."""

        def read() -> bytes:
            content = bytes(self._system.cat_file(self._path(name)))
            _refuse_page(content[:_HEAD_BYTES])
            return content

        return self._retry.run(read, f"{self.url}/{name}")

    def read_index(self) -> bytes:
        """Return the index of the data set. Raises `DataError` where there is none, naming what lies there instead."""
        try:
            return self.read(INDEX)
        except MissingFile as error:
            parts = [name for name in PARTS if self._has(f"{name}/{INDEX}")]
            raise DataError(
                f"{self.url}/{INDEX} is missing: no token shards lie at this URL",
                f"the URL of a folder that `palimpsest prepare` wrote, which holds {INDEX}",
                f"name one of its folders: {', '.join(f'{self.url}/{name}' for name in parts)}"
                if parts
                else "check the URL: bucket or host, and every part of the path",
            ) from error

    def data_sets(self) -> list[str]:
        """Return the names of the folders of token shards right under the URL, sorted; none where it is one itself, or
        where the store lists nothing or fails, which opening the URL reports."""
        if self._has(INDEX):
            return []
        try:
            found = [path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._root, detail=False)]
        except Exception:  # every file system has exceptions of its own
            return []
        return sorted(name for name in set(found) if name and self._has(f"{name}/{INDEX}"))

    def _has(self, name: str) -> bool:
        try:
            return bool(self._system.exists(self._path(name)))
        except Exception:  # advice alone depends on it
            return False

    def open(self, array: ArrayFile, before_wait: Callable[[], None] = lambda: None) -> tuple[str, BinaryIO]:
        """Return the name of an array's file in the cache, and the open file that keeps it there until it is closed.
        `before_wait` as in `ShardCache.open`.

        Raises:
            DamagedShard: it is missing, or not what was written, also when it is fetched again.
            DataError: it cannot be fetched, or the cache has no room.
        """
        name, num_bytes, fetch = self._wanted(array)
        return name, self.cache.open(name, num_bytes, fetch, before_wait)

    def fetch_ahead(self, array: ArrayFile) -> None:
        """Bring a file into the cache, if there is room and nobody else is at it. Raises as `open`."""
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
        """Write a file whole. Raises `DamagedShard` where it is not what the index says."""
        digest, found, head = xxhash.xxh3_128(), 0, b""
        # an attempt before may have broken off in the middle; the file keeps its whole size, so the rest is overwritten
        target.seek(0)
        # no cache of fsspec's: blocks are read once, from front to back
        source: Any = self._system.open(self._path(name), "rb", cache_type="none")
        with source:
            while block := source.read(_BLOCK_BYTES):
                found += len(block)
                head = head or bytes(block[:_HEAD_BYTES])
                if found > num_bytes:  # not a byte more than was announced
                    break
                digest.update(block)
                try:
                    target.write(block)
                except OSError as error:
                    raise self.cache.unwritable(error, num_bytes) from error
        if found == num_bytes and digest.hexdigest() == xxh3:
            return
        # pages first: a log-in page in place of the file is no damage of the shard
        url, told = f"{self.url}/{name}", digest.hexdigest()
        _refuse_page(head)
        if found != num_bytes:
            what = f"truncated: {found:,} bytes" if found < num_bytes else "longer than it was written"
            raise DamagedShard(f"{url} is {what}", f"{num_bytes:,} bytes", PREPARE_AGAIN)
        raise DamagedShard(f"{url} is damaged: its bytes have xxh3 {told}", f"xxh3 {xxh3}", PREPARE_AGAIN)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _refuse_page(head: bytes) -> None:
    """Raise `OSError` where content begins as pages of errors and log-ins do, in HTML or XML."""
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        raise OSError(f"a web page came instead of the file: {head.decode(errors='replace')[:80]!r}")
