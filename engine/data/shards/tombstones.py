"""Tombstones: documents that are forgotten, each named by the content hash of its shard and its number in that shard.

They lie in `tombstones.jsonl` of a data folder, or of a run folder (for data at a URL, or that cannot be written to);
shards are not rewritten. A line names one document: `{"shard": "1f0c...", "document": 17}`. Invariants: naming by
content means that a tombstone holds wherever a copy of the shard lies, and says nothing about another shard; the file
only grows, in one move, so a reader finds it whole; a document that is named twice counts once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from engine.atomic import write_atomically
from engine.errors import DataError

FILE = "tombstones.jsonl"
_ATTEMPTS = 16
"""Attempts to add lines on a file system without locks, where another writer may take the same moment."""


class Tombstones:
    """Set of forgotten documents. Does not change once it is made."""

    def __init__(self, documents: Mapping[str, Iterable[int]] | None = None) -> None:
        """Make the set from numbers of documents by content hash of their shard (`ShardEntry.content_hash`)."""
        given = {shard: np.unique(np.fromiter(numbers, np.int64)) for shard, numbers in (documents or {}).items()}
        self._documents = {shard: given[shard] for shard in sorted(given) if given[shard].size}

    def __len__(self) -> int:
        return sum(numbers.size for numbers in self._documents.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tombstones) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __or__(self, other: Tombstones) -> Tombstones:
        """Return the documents of both sets."""
        shards = self._documents.keys() | other._documents.keys()
        return Tombstones({shard: np.concatenate([self.of(shard), other.of(shard)]) for shard in shards})

    def __sub__(self, other: Tombstones) -> Tombstones:
        """Return the documents that are not in another set."""
        return Tombstones({shard: np.setdiff1d(found, other.of(shard)) for shard, found in self._documents.items()})

    @property
    def shards(self) -> tuple[str, ...]:
        """Content hashes of the shards that hold a forgotten document, sorted."""
        return tuple(self._documents)

    @cached_property
    def hash(self) -> str:
        """Hash of the set, 16 hex digits, whatever the order and the files that it was read from; empty without any."""
        digest = hashlib.sha256()
        for shard, numbers in self._documents.items():
            # the count ends the text of variable length: no two sets give the same bytes
            digest.update(f"{shard} {numbers.size}\n".encode() + numbers.astype("<i8").tobytes())
        return digest.hexdigest()[:16] if self._documents else ""

    def of(self, shard: str) -> np.ndarray:
        """Return the numbers of a shard's forgotten documents, (n,) int64, rising; (0,) where it has none."""
        return self._documents.get(shard, np.empty(0, np.int64))

    def only(self, shards: Iterable[str]) -> Tombstones:
        """Return the documents of some shards alone."""
        return Tombstones({shard: self.of(shard) for shard in set(shards) & self._documents.keys()})

    def contains(self, shards: Sequence[str], numbers_N: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
        """Return True for each forgotten document, (N,) bool.

        Document i is number `documents_N[i]` of the shard with content hash `shards[numbers_N[i]]`. A table of hashes
        without tombstones costs one look at it, however many documents are asked for.
        """
        found_N = np.zeros(len(numbers_N), bool)
        for number, shard in enumerate(shards):
            if shard in self._documents:
                mine = np.flatnonzero(numbers_N == number)
                found_N[mine] = np.isin(documents_N[mine], self._documents[shard])
        return found_N


NO_TOMBSTONES = Tombstones()


def read_tombstones(folder: Path) -> Tombstones:
    """Return the tombstones that lie in a folder; none where it has no such file. Raises `DataError`: damaged."""
    return _parse(_content(folder), folder / FILE)


def add_tombstones(folder: Path, added: Tombstones) -> int:
    """Put tombstones into a folder's file, on the disk when this returns, and return how many are new there.

    Several processes may add at once.

    Raises:
        DataError: the folder cannot be written to, or its file is damaged.
    """
    try:
        with _alone(folder):
            new = added - read_tombstones(folder)
            left = new
            for _ in range(_ATTEMPTS):
                if not len(left):
                    return len(new)
                # read anew each time: without locks another writer may have moved its file over this one's
                write_atomically(folder / FILE, _content(folder) + b"".join(_lines(left)))
                left = new - read_tombstones(folder)
    except OSError as error:
        raise DataError(
            f"{folder / FILE} cannot be written: {error.strerror or error}",
            "a data folder that can be written to, on a disk with room",
            "mend that, or name the runs with --run: tombstones then go into the run folders",
        ) from error
    raise DataError(
        f"{folder / FILE} loses lines: others write to it, and the file system has no locks",
        "one `palimpsest forget` at a time",
        "run the same command again",
    )


def _lines(tombstones: Tombstones) -> Iterator[bytes]:
    for shard in tombstones.shards:
        for number in tombstones.of(shard).tolist():
            yield json.dumps({"shard": shard, "document": number}).encode() + b"\n"


def _content(folder: Path) -> bytes:
    path = folder / FILE
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        # not passed over: a run would train on what is to be forgotten
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "a readable file", "mend it or its rights"
        ) from error


def _parse(content: bytes, path: Path) -> Tombstones:
    found: dict[str, list[int]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            shard, document = row["shard"], row["document"]
            # not isinstance: JSON's true and false are instances of int
            if not isinstance(shard, str) or type(document) is not int or not 0 <= document < 2**63:
                raise ValueError("no shard's hash and document's number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}:{number} names no document ({error})",
                'lines such as {"shard": "HASH", "document": 17}',
                "restore the file from a copy: a run that went on without it would train on forgotten documents",
            ) from error
        found.setdefault(shard, []).append(document)
    return Tombstones(found)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the folder, and hold it. Raises `OSError`."""
    # the folder itself is locked, since the file is replaced by each writer
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
