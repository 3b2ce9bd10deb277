"""Shards that a process keeps open, over all its data sets: bounded in number and in unpacked bytes.

The number of files that a process may have open is a limit of the process (RLIMIT_NOFILE), often 1,024, so the bound
is shared by every data set of the process. Which shard is opened, and how, is the business of `dataset`.
"""

from __future__ import annotations

import errno
import resource
from collections import OrderedDict, deque
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, BinaryIO

from engine.errors import DataError

_WANTED_FILES = 65_536
"""Soft limit of open files that is asked for where the hard limit allows it."""
_OTHER_FILES = 512
"""Files left to the rest of the process: sockets of collectives, checkpoints, libraries."""
_FEWEST_SHARDS = 16


class TooManyFiles(DataError):
    """The process, or the system, may have no more files open."""


def raise_file_limit() -> int:
    """Raise the soft limit of open files of this process as far as the hard limit allows; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # refused by the system: the shards fit into what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else soft


def too_many_files(error: OSError) -> TooManyFiles | None:
    """Return an error that names the limit of open files; None if `error` is about something else."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # EMFILE is the process's limit, ENFILE that of the whole system
    if error.errno == errno.ENFILE:
        return TooManyFiles(
            f"the system has too many open files: {error.filename or error.strerror}",
            "fewer than /proc/sys/fs/file-max",
            "end other processes, or have the system's limit raised",
        )
    return TooManyFiles(
        f"this process has too many open files: {soft:,} are allowed (ulimit -n), {hard:,} at most (ulimit -Hn)",
        f"{2 * _OTHER_FILES:,} or more",
        "raise the limit where the run is started: ulimit -n 65536 (in a service or a container, its own setting)",
    )


@dataclass(frozen=True)
class _Entry:
    shard: Any
    file: BinaryIO | None
    """Keeps the shard's file in the cache until it is closed."""
    num_bytes: int
    """Unpacked bytes in memory."""


class OpenShards:
    """Open shards by (owner, number); the least recently used are dropped first. Safe to share between threads."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Hashable, int], _Entry] = OrderedDict()
        self._gone: deque[Hashable] = deque()
        self._lock = Lock()
        self._most: int | None = None

    def get(self, owner: Hashable, number: int) -> Any | None:
        """Return an open shard, which counts as used now; None where it is not open."""
        with self._lock:
            entry = self._entries.get((owner, number))
            if entry is None:
                return None
            # the dictionary's order is that of use, the oldest first
            self._entries.move_to_end((owner, number))
            return entry.shard

    def put(
        self,
        owner: Hashable,
        number: int,
        shard: Any,
        file: BinaryIO | None,
        num_bytes: int,
        most_shards: int,
        most_bytes: int,
    ) -> None:
        """Keep a shard open; drop others where there are more than `most_shards` or `most_bytes` of unpacked ones."""
        most = max(1, min(most_shards, self.most_by_files()))
        with self._lock:
            # here, since a finalizer may run in a thread that holds the lock
            while self._gone:
                self._forget(self._gone.popleft())
            # a shard that is put again closes the file of the one before
            self._drop((owner, number))
            unpacked = sum(entry.num_bytes for entry in self._entries.values())
            for key, entry in list(self._entries.items()):
                # the least recently used first; a map goes only for the number's sake, an unpacked shard for either
                if len(self._entries) < most and unpacked + num_bytes <= most_bytes:
                    break
                if len(self._entries) >= most or entry.num_bytes:
                    unpacked -= entry.num_bytes
                    self._drop(key)
            self._entries[owner, number] = _Entry(shard, file, num_bytes)

    def numbers(self, owner: Hashable) -> list[int]:
        """Return the numbers of an owner's open shards, the least recently used first."""
        with self._lock:
            return [number for whose, number in self._entries if whose == owner]

    def forget(self, owner: Hashable) -> None:
        """Drop all shards of an owner at the next opportunity. Takes no lock, so a finalizer may call it."""
        self._gone.append(owner)

    def release(self, owner: Hashable | None = None) -> None:
        """Drop the shards that hold a file in a cache: those of one owner, or all."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.file is not None and owner in (None, key[0]):
                    self._drop(key)

    def drop_all(self) -> None:
        """Drop every shard, where the process has no file left to open."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    def most_by_files(self) -> int:
        """Return the number of shards that fit the limit of open files: each takes two, its map and its cached file."""
        if self._most is None:
            # asked once: the limit is the process's, and it is raised at the first shard
            self._most = max(_FEWEST_SHARDS, (raise_file_limit() - _OTHER_FILES) // 2)
        return self._most

    def _forget(self, owner: Hashable) -> None:
        for key in [key for key in self._entries if key[0] == owner]:
            self._drop(key)

    def _drop(self, key: tuple[Hashable, int]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.file is not None:
            entry.file.close()


PROCESS = OpenShards()
"""The open shards of this process, shared by all data sets, as the limit of open files is."""
