"""Token shards as memory maps, each verified by its hash before the first token of it is used.

Invariant: no process hands out a token of a shard whose hash it has not compared with the index (`arrays` does). Plain
shards are maps; compressed ones are unpacked in memory, and as many kept as `UNPACKED_BYTES` holds. A map of a remote
shard keeps its file in the cache until `release`; before a process waits for room there it releases all that it holds,
so that processes never wait for each other. Tokens of forgotten documents (`tombstones`) are replaced by ends of text
while a shard is opened, so that no reader sees them. Which tokens make a sample is the business of
`engine.data.objectives.packing` and `engine.data.order.sample_order`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from engine.data.shards.arrays import Identity, open_array
from engine.data.shards.cache import ShardCache
from engine.data.shards.damage import DamagedShard
from engine.data.shards.ids import default_id, from_array
from engine.data.shards.index import FILE, PREPARE_AGAIN, ArrayFile, ShardEntry, parse_index, read_index
from engine.data.shards.open_shards import PROCESS, TooManyFiles
from engine.data.shards.remote import RemoteFolder, is_remote
from engine.data.shards.tombstones import FILE as TOMBSTONES_FILE
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones, read_tombstones
from engine.errors import DataError

OPEN_SHARDS = 512
"""Most shards that a process keeps open at once, over all its data sets: two windows of 16 shards of 16 sources. Fewer
where the limit of open files has no room for them."""

UNPACKED_BYTES = 4 << 30
"""Bytes of unpacked shards that a process keeps at once; a window of the order should fit, or each of its samples
unpacks a shard."""

Offsets = tuple[np.ndarray, np.ndarray | None]
"""`documents` and `sentences` of a shard."""


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
    forgotten: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(n, 2) int64 first token, and the one behind the last, of each forgotten document, rising: no target is there."""

    def is_forgotten(self, positions: np.ndarray | int) -> np.ndarray:
        """Return True for each position that lies in a forgotten document, in the shape of `positions`."""
        # documents [3, 5) and [5, 8): edges 3, 5, 5, 8; position 5 has three of them at or below it, an odd number
        return np.searchsorted(self.forgotten.ravel(), positions, side="right") % 2 == 1


class TokenDataset:
    """A folder of token shards, on disk or at a URL.

    Reads the index alone; shards are fetched, opened and verified when they are first asked for. Safe to share between
    threads.
    """

    def __init__(
        self,
        location: Path | str,
        tokenizer_hash: str | None = None,
        cache: ShardCache | None = None,
        tombstones: Tombstones = NO_TOMBSTONES,
        fill_id: int | None = None,
    ) -> None:
        """Read the index; with a `tokenizer_hash`, refuse shards of another tokenizer. A URL needs a `cache`.

        Documents are forgotten that `tombstones` or those in the folder name; `fill_id` replaces their tokens (None:
        the end of text).

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
            self.index = parse_index(self._remote.read_index(), f"{self._remote.url}/{FILE}")
        else:
            self.folder = Path(location)
            self.index = read_index(self.folder)
            tombstones = tombstones | read_tombstones(self.folder)
        self.fingerprint = self.index.fingerprint  # of what the folder holds, wherever it lies
        if tokenizer_hash is not None and tokenizer_hash != self.index.tokenizer_hash:
            raise DataError(
                f"the shards in {self.location} were written with tokenizer {self.index.tokenizer_hash}, "
                f"but this run's tokenizer is {tokenizer_hash}",
                "the tokenizer that the shards were written with",
                "name that tokenizer's folder, or prepare the text again with this one",
            )
        self.tombstones = _own(tombstones, self.index.shards, self.location)
        """Forgotten documents of this data set, as known when it was opened."""
        self._fill_id = self.index.eos_id if fill_id is None else fill_id
        self._verified: dict[str, Identity] = {}
        self._offsets_of: OrderedDict[int, Offsets] = OrderedDict()
        self._columns: dict[tuple[str, int], np.ndarray] = {}
        self._owner = object()
        self._lock = Lock()
        # `PROCESS` holds the open shards by `_owner`, which does not refer back, so that the data set can be collected
        weakref.finalize(self, PROCESS.forget, self._owner)

    @property
    def num_shards(self) -> int:
        return len(self.index.shards)

    @property
    def _open(self) -> list[int]:
        """Numbers of the shards that are open."""
        return PROCESS.numbers(self._owner)

    def shard(self, number: int) -> Shard:
        """Return a shard, verified when this process first opens it.

        Raises:
            DamagedShard: a file of it is missing, of another size, or its bytes are not those that were written.
            DataError: a file cannot be read.
        """
        # asked for dozens of times per batch: an open one without this data set's lock
        found = PROCESS.get(self._owner, number)
        return self._opened(number) if found is None else found

    def _opened(self, number: int) -> Shard:
        with self._lock, _naming(number):
            found = PROCESS.get(self._owner, number)  # another thread may have been first
            if found is None:
                try:
                    found, file = self._map(number)
                except TooManyFiles:  # what else the process opened takes more than was left to it
                    PROCESS.drop_all()
                    found, file = self._map(number)
                num_bytes = _unpacked_bytes(self.index.shards[number])
                PROCESS.put(self._owner, number, found, file, num_bytes, OPEN_SHARDS, UNPACKED_BYTES)
            return found

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def cache(self) -> ShardCache | None:
        """Cache of a data set at a URL; None for a folder."""
        return None if self._remote is None else self._remote.cache

    def release(self) -> None:
        """Let the cache evict what this process has open: call when nothing of it is in use. What needs no file in
        the cache stays: local shards, and those that are unpacked in memory."""
        if self.is_remote:
            PROCESS.release(self._owner)

    def fetch_ahead(self, number: int) -> None:
        """Bring a remote shard into the cache, if there is room and nobody else is at it. Raises as `shard`."""
        assert self._remote is not None
        for array in self.index.shards[number].arrays:
            self._remote.fetch_ahead(array)

    def forgotten_documents(self, number: int) -> np.ndarray:
        """Return the numbers of a shard's forgotten documents, rising, (n,)."""
        return self.tombstones.of(self.index.shards[number].content_hash)

    def stored_bytes(self, number: int) -> int:
        """Return the bytes that the cache must hold for a remote shard to be read."""
        return sum(array.stored_bytes for array in self.index.shards[number].arrays)

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Verify every shard; `progress` is told the bytes of each. Raises `DataError` at the first bad one."""
        for number, entry in enumerate(self.index.shards):
            self.shard(number)
            self.ids(number)
            for name, _ in entry.columns:
                self.column(name, number)
            self.release()
            progress(sum(array.stored_bytes for array in entry.files))

    def ids(self, number: int) -> list[str]:
        """Return the ids of a shard's documents, verified: their own, or else `SHARD_HASH:ROW`. Raises as `shard`."""
        entry = self.index.shards[number]
        if entry.ids is None:
            return [default_id(entry.content_hash, document) for document in range(entry.num_documents)]
        with self._lock, _naming(number):
            array, identity, file = self._array(self.folder, entry.ids, entry.ids.file)
            try:
                found = from_array(array)
            except ValueError:
                found = []
            if file is not None:
                file.close()
            if len(found) != entry.num_documents:
                raise DamagedShard(
                    f"{self.folder / entry.ids.file} holds no ids of {entry.num_documents:,} documents",
                    "a JSON string a line, one for each document",
                    PREPARE_AGAIN,
                )
            self._verified[entry.ids.file] = identity
            return found

    def column(self, name: str, number: int) -> np.ndarray:
        """Return a column of a shard, verified, (documents,) or (tokens,) int64 or float64.

        Raises as `shard`, and `DataError` where the shard has none of that name.
        """
        key = (name, number)
        if key not in self._columns:
            array = dict(self.index.shards[number].columns).get(name)
            if array is None:
                raise DataError(
                    f"the shards in {self.location} have no column {name}",
                    f"one of {', '.join(self.index.columns)}" if self.index.columns else "shards with columns",
                    "name another column, or prepare the text again with it",
                )
            with self._lock, _naming(number):
                found, identity, file = self._array(self.folder, array, array.file)
                self._columns[key] = found.copy()  # so that the file may be closed at once
                if file is not None:
                    file.close()
                self._verified[array.file] = identity
        return self._columns[key]

    def whole_column(self, name: str) -> np.ndarray:
        """Return a column of all shards, one behind the other. Raises as `column`."""
        return np.concatenate([self.column(name, number) for number in range(self.num_shards)])

    def offsets(self, number: int) -> Offsets:
        """Return a shard's `documents` and `sentences`, verified; no token is read. Raises as `shard`."""
        with _naming(number):
            return self._both_offsets(number)

    def _both_offsets(self, number: int) -> Offsets:
        entry = self.index.shards[number]
        documents = self._offsets(entry.documents, entry.num_tokens)
        sentences = None if entry.sentences is None else self._offsets(entry.sentences, entry.num_tokens, documents)
        return documents, sentences

    def _offsets(self, array: ArrayFile, num_tokens: int, contained: np.ndarray | None = None) -> np.ndarray:
        """Return verified rising offsets; `contained` are offsets that must be among them."""
        is_new = array.file not in self._verified
        found, identity, file = self._array(self.folder, array, array.file)
        # a copy, so that the file may be closed at once
        offsets = found.astype(np.int64)
        if file is not None:
            file.close()
        if is_new:
            _check_offsets(self.folder / array.file, offsets, num_tokens, contained)
        self._verified[array.file] = identity
        return offsets

    def _map(self, number: int) -> tuple[Shard, BinaryIO | None]:
        """Open a shard; return it, and the file that keeps it in the cache where it is mapped there."""
        tokens = self.index.shards[number].tokens
        documents, sentences = self._offsets_of.pop(number, None) or self._both_offsets(number)
        # (n, 2): [first, end) of each forgotten document; documents [0, 3, 5, 8] of which 1 is forgotten give [[3, 5]]
        numbers = self._forgotten(number)
        forgotten = np.stack([documents[numbers], documents[numbers + 1]], axis=1)
        where = self.folder / (self.index.tokens_folder or "")
        mapped, identity, file = self._array(where, tokens, tokens.name, private=len(forgotten) > 0)
        for first, end in forgotten.tolist():
            mapped[first:end] = self._fill_id
        mapped.flags.writeable = False
        if tokens.compressed is not None and file is not None:
            file.close()  # what is unpacked in memory needs no file
            file = None
        if file is not None:  # opened again at each step; its offsets are copies and need not be
            self._offsets_of[number] = documents, sentences
            while len(self._offsets_of) > OPEN_SHARDS:
                self._offsets_of.popitem(last=False)
        self._verified[tokens.name] = identity
        return Shard(tokens.name, mapped, documents, sentences, forgotten), file

    def _forgotten(self, number: int) -> np.ndarray:
        """Return the numbers of a shard's forgotten documents, (n,) int64."""
        # without tombstones no shard's hash is asked for
        return self.tombstones.of(self.index.shards[number].content_hash if len(self.tombstones) else "")

    def _array(
        self, folder: Path, array: ArrayFile, name: str, private: bool = False
    ) -> tuple[np.ndarray, Identity, BinaryIO | None]:
        """Return an array, its file's identity, and the open file that keeps it in the cache. A file that was damaged
        there is fetched once more. `private` as in `open_array`."""
        if self._remote is None:
            return *self._local_array(folder, array, self._verified.get(name), private), None
        # a copy that was damaged in the cache is fetched once more: the fault may be this disk's and not the store's
        for again in (True, False):
            cached, file = self._remote.open(array, PROCESS.release)
            try:
                return *open_array(self.folder, replace(array, file=cached), self._verified.get(name), private), file
            except DamagedShard:
                file.close()
                self._remote.cache.discard(cached)
                if not again:
                    raise
            # an open file is a lock: left open, the cache could never evict it
            except BaseException:
                file.close()
                raise
        raise AssertionError("returned or raised above")

    def _local_array(
        self, folder: Path, array: ArrayFile, verified: Identity | None, private: bool
    ) -> tuple[np.ndarray, Identity]:
        try:
            return open_array(folder, array, verified, private)
        except DamagedShard as error:
            # without the index, too, the whole folder is away; doing without its shards one by one would be no remedy
            if (self.folder / FILE).exists():
                raise
            raise DataError(  # a disk that is away is no damage, which a run might do without for good
                f"{error.wrong}, and so is {self.folder / FILE}",
                "the folder as it was when the run began",
                "look whether its disk is mounted, then train again: the run resumes",
            ) from error


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Set the number of the shard in a `DamagedShard` that is raised inside."""
    try:
        yield
    except DamagedShard as error:
        error.number = number
        raise


def _own(tombstones: Tombstones, shards: tuple[ShardEntry, ...], location: str) -> Tombstones:
    """Return the tombstones of these shards. Raises `DataError` where a shard has no document of such a number."""
    if not len(tombstones):
        return NO_TOMBSTONES
    counts = {shard.content_hash: shard.num_documents for shard in shards}
    own = tombstones.only(counts)
    for shard in own.shards:
        if own.of(shard)[-1] >= counts[shard]:
            raise DataError(
                f"{TOMBSTONES_FILE} names document {own.of(shard)[-1]} of a shard of {location}, which has "
                f"{counts[shard]:,} documents ({shard})",
                f"0 to {counts[shard] - 1}",
                "restore the file from a copy: `palimpsest forget` writes no such line",
            )
    return own


def _unpacked_bytes(entry: ShardEntry) -> int:
    """Return the bytes of memory that an open shard takes besides its maps."""
    return 0 if entry.tokens.compressed is None else entry.tokens.bytes


def _check_offsets(path: Path, offsets: np.ndarray, num_tokens: int, contained: np.ndarray | None) -> None:
    """Raise `DamagedShard` for offsets that no writer of ours makes, though their hash is right."""
    rising = (
        offsets.size > 0 and offsets[0] == 0 and offsets[-1] == num_tokens and not (offsets[1:] < offsets[:-1]).any()
    )
    if not rising or (contained is not None and not np.isin(contained, offsets).all()):
        raise DamagedShard(
            f"offsets {path} do not fit their shard",
            f"rising from 0 to {num_tokens}" + ("" if contained is None else ", each document's among them"),
            PREPARE_AGAIN,
        )
