"""Token shards as memory maps, each verified by its hash before the first token of it is used.

Invariant: no process hands out a token of a shard whose hash it has not compared with the index (`arrays` does). Plain
shards are maps; compressed ones are unpacked in memory, and as many kept as `UNPACKED_BYTES` holds. Which tokens make a
sample is the business of `engine.data.objectives.packing` and `engine.data.order.stream`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from engine.data.shards.arrays import open_array
from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.index import FILE, PREPARE_AGAIN, ArrayFile, ShardEntry, parse_index, read_index
from engine.data.shards.remote import RemoteFolder, is_remote
from engine.errors import DataError

OPEN_SHARDS = 128
"""Shards kept mapped at once: each holds two file descriptors, of which a process often has but 1,024."""

UNPACKED_BYTES = 4 << 30
"""Bytes of unpacked shards kept at once; a window of the order should fit, or each of its samples unpacks a shard."""


@dataclass(frozen=True)
class Shard:
    """One verified shard: `tokens` (n,) uint16 or uint32 memory map, `documents` (documents + 1,) int64 offsets.

    Document i is tokens[documents[i] : documents[i + 1]], its end-of-text included. `sentences` (sentences + 1,)
    int64 are offsets, too, those of the documents among them; None where the text was prepared without.
    """

    name: str
    tokens: np.ndarray
    documents: np.ndarray
    sentences: np.ndarray | None = None


class TokenDataset:
    """A folder of token shards, on disk or at a URL.

    Reads the index alone; shards are fetched, opened and verified when they are first asked for. Safe to share between
    threads.
    """

    def __init__(
        self, location: Path | str, tokenizer_hash: str | None = None, cache: ShardCache | None = None
    ) -> None:
        """With a `tokenizer_hash`, shards of another tokenizer are refused. A URL needs a `cache`.

        Raises:
            DataError: the index is missing, damaged, of another version, or of another tokenizer.
        """
        self.location = str(location)
        """Folder or URL, as it was named."""
        self._remote = None
        if is_remote(self.location):
            assert cache is not None, "resolve() lets no URL without a cache pass"
            self._remote = RemoteFolder(self.location, cache)
            self.folder = cache.folder
            self.index = parse_index(self._remote.read(FILE), f"{self.location}/{FILE}")
        else:
            self.folder = Path(location)
            self.index = read_index(self.folder)
        self.fingerprint = self.index.fingerprint  # of what the folder holds, wherever it lies
        if tokenizer_hash is not None and tokenizer_hash != self.index.tokenizer_hash:
            raise DataError(
                f"the shards in {self.location} were written with tokenizer {self.index.tokenizer_hash}, "
                f"but this run's tokenizer is {tokenizer_hash}",
                "the tokenizer that the shards were written with",
                "name that tokenizer's folder, or prepare the text again with this one",
            )
        self._verified: set[str] = set()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._held: dict[int, BinaryIO] = {}
        self._lock = Lock()

    @property
    def num_shards(self) -> int:
        return len(self.index.shards)

    def shard(self, number: int) -> Shard:
        """A shard, verified when this process first opens it.

        Raises:
            DamagedShard: a file of it is missing, of another size, or its bytes are not those that were written.
            DataError: a file cannot be read.
        """
        with self._lock, _naming(number):
            found = self._open.pop(number, None)
            if found is None:
                found = self._map(number)
                self._make_room(self.index.shards[number])
            self._open[number] = found
            return found

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    def release(self) -> None:
        """Lets the cache evict what this process has open: call when nothing of it is in use. Local shards stay."""
        if self.is_remote:
            with self._lock:
                for number in list(self._open):
                    self._drop(number)

    def fetch_ahead(self, number: int) -> None:
        """Brings a remote shard into the cache, if there is room and nobody else is at it. Raises as `shard`."""
        assert self._remote is not None
        for array in self.index.shards[number].arrays:
            self._remote.fetch_ahead(array)

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Verifies every shard; `progress` is told the bytes of each. Raises `DataError` at the first bad one."""
        for number, entry in enumerate(self.index.shards):
            self.shard(number)
            progress(sum(array.stored_bytes for array in entry.arrays))

    def offsets(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A shard's `documents` and `sentences` alone: no token is read, and verified like it. Raises as `shard`."""
        with _naming(number):
            return self._both_offsets(number)

    def _both_offsets(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        entry = self.index.shards[number]
        documents = self._offsets(entry.documents, entry.num_tokens)
        sentences = None if entry.sentences is None else self._offsets(entry.sentences, entry.num_tokens, documents)
        return documents, sentences

    def _offsets(self, array: ArrayFile, num_tokens: int, contained: np.ndarray | None = None) -> np.ndarray:
        """Rising offsets with those that they must contain."""
        is_new = array.file not in self._verified
        found, file = self._array(self.folder, array, not is_new)
        offsets = found.astype(np.int64)
        if file is not None:
            file.close()
        if is_new:
            _check_offsets(self.folder / array.file, offsets, num_tokens, contained)
            self._verified.add(array.file)
        return offsets

    def _map(self, number: int) -> Shard:
        tokens = self.index.shards[number].tokens
        folder = self.folder / (self.index.tokens_folder or "")
        mapped, file = self._array(folder, tokens, tokens.name in self._verified)
        if file is not None:
            self._held[number] = file
        documents, sentences = self._both_offsets(number)
        self._verified.add(tokens.name)
        return Shard(tokens.name, mapped, documents, sentences)

    def _array(self, folder: Path, array: ArrayFile, is_verified: bool) -> tuple[np.ndarray, BinaryIO | None]:
        """An array, and what holds its file in the cache. A file that was damaged there is fetched once more."""
        if self._remote is None:
            return open_array(folder, array, is_verified), None
        for again in (True, False):
            name, file = self._remote.open(array)
            try:
                return open_array(self.folder, replace(array, file=name), is_verified), file
            except DamagedShard:
                file.close()
                self._remote.cache.discard(name)
                if not again:
                    raise
        raise AssertionError("returned or raised above")

    def _drop(self, number: int) -> None:
        del self._open[number]
        if (file := self._held.pop(number, None)) is not None:
            file.close()

    def _make_room(self, entry: ShardEntry) -> None:
        """Drops the shards that were not used for longest, until another one has a place."""
        unpacked = sum(_unpacked_bytes(self.index.shards[number]) for number in self._open)
        while self._open and (len(self._open) >= OPEN_SHARDS or unpacked + _unpacked_bytes(entry) > UNPACKED_BYTES):
            dropped = next(iter(self._open))
            self._drop(dropped)
            unpacked -= _unpacked_bytes(self.index.shards[dropped])


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Damage that is found inside is that of this shard."""
    try:
        yield
    except DamagedShard as error:
        error.number = number
        raise


def _unpacked_bytes(entry: ShardEntry) -> int:
    """Memory that an open shard takes beside maps."""
    return 0 if entry.tokens.compressed is None else entry.tokens.bytes


def _check_offsets(path: Path, offsets: np.ndarray, num_tokens: int, contained: np.ndarray | None) -> None:
    """Refuses offsets that no writer of ours makes, though their hash is right."""
    rising = (
        offsets.size > 0 and offsets[0] == 0 and offsets[-1] == num_tokens and not (offsets[1:] < offsets[:-1]).any()
    )
    if not rising or (contained is not None and not np.isin(contained, offsets).all()):
        raise DamagedShard(
            f"offsets {path} do not fit their shard",
            f"rising from 0 to {num_tokens}" + ("" if contained is None else ", each document's among them"),
            PREPARE_AGAIN,
        )
