"""A frozen generation of a reservoir as a data set: blocks of entries are its shards, and entries its documents.

It offers what `TokenDataset` offers, so samplers, orders and streams work on it as on any other source: rows are packed
anew for the run stage's objective and sequence length. Nothing is copied to the disk; a block's tokens are read from
the data sets, which are found by the content hashes of their shards, when it is first asked for.

Entries are put in an order that keeps those of one source shard together, shards in a keyed order, and then cut into
blocks. So a block needs few source shards, which matters where they have to be fetched, and a window of blocks mixes
many. Order and blocks follow from (generation, block size) alone.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from threading import Lock
from typing import NamedTuple

import numpy as np

from engine.data.replay.generation import MOST_STALE, Generation
from engine.data.replay.pinned import PinnedRow, PinnedRows, refuse_other_tokenizer
from engine.data.replay.rows import INSIDE, SPAN_BITS, documents_of, shards_of, spans_of
from engine.data.shards.damage import DamagedShard
from engine.data.shards.dataset import OPEN_SHARDS, UNPACKED_BYTES, Offsets, Shard, TokenDataset
from engine.data.shards.index import ArrayFile, Index, ShardEntry, token_dtype
from engine.data.shards.open_shards import PROCESS
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.errors import DataError

BLOCK_ROWS = 1024
"""Entries of a block. With fewer, more of the tokens lie in the short last row of a block; with more, a window needs
more source shards."""
PURPOSE_BLOCKS = int.from_bytes(b"blocks")


@dataclass(frozen=True)
class ReplayIndex(Index):
    """Index of a view: entries in blocks, under the generation's hash."""

    generation: str = ""
    """Hash of the generation."""
    splits_sentences: bool = False
    """True where some document of the data sets has more than one sentence."""

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"replay {self.generation} {self.tokenizer_hash}".encode()).hexdigest()[:32]

    @property
    def num_sentences(self) -> int:
        """Number of sentences at least: those of the entries are not counted before they are read."""
        return self.num_documents + self.splits_sentences if self.has_sentences else 0


class Entry(NamedTuple):
    """An entry of a view: its domain, the content hash of its source shard, document and span in it, and tokens."""

    domain: str
    content_hash: str
    document: int
    span: int
    num_tokens: int


class ReplayDataset(TokenDataset):
    """The rows of a generation. Safe to share between threads, as `TokenDataset` is."""

    def __init__(
        self,
        generation: Generation,
        datasets: Sequence[TokenDataset],
        tombstones: Tombstones = NO_TOMBSTONES,
        most_stale: float = MOST_STALE,
        block_rows: int = BLOCK_ROWS,
        fill_id: int | None = None,
    ) -> None:
        """Find the rows' shards in the data sets; no token and no offset is read.

        Rows of shards that none of them has are left out, counted and logged. Documents that `tombstones` or those of
        the data sets name keep their place: their tokens are ends of text (or `fill_id`), and none of them is a target.

        Raises:
            DataError: the generation has no row, more than `most_stale` of them are lost, or the data sets were written
                with different tokenizers.
        """
        self._found = _shards_by_hash(datasets)
        self._pinned = generation.pinned
        if self._pinned is not None and datasets:
            refuse_other_tokenizer(self._pinned, datasets[0].index, datasets[0].location)
        self.generation = generation.without_stale(self._found, most_stale)
        """The rows that are there."""
        _refuse_none(self.generation, datasets)
        known = reduce(or_, (dataset.tombstones for dataset in datasets), tombstones)
        self.tombstones = known.only(self.generation.shards)
        """Forgotten documents of the rows' shards, as known when the view was opened."""
        self._datasets = tuple(datasets)
        self._row_ids, self._lengths, self._domains, self.domains = _in_blocks(self.generation)
        self._bounds = np.append(np.arange(0, self._row_ids.size, block_rows), self._row_ids.size)
        self.index = self._index(datasets[0].index if datasets else _index_of(self._pinned))
        self.fingerprint = self.index.fingerprint
        self._fill_id = self.index.eos_id if fill_id is None else fill_id
        self.location = f"replay of generation {self.generation.hash[:8]}"
        self._lock = Lock()
        self._owner = object()
        weakref.finalize(self, PROCESS.forget, self._owner)

    @property
    def is_remote(self) -> bool:
        return any(dataset.is_remote for dataset in self._datasets)

    def shard(self, number: int) -> Shard:
        """Return a block as a shard, read when it is first asked for.

        Raises:
            DamagedShard: a source shard is missing or damaged; `number` is the block's.
            DataError: a file cannot be read.
        """
        with self._lock:
            found = PROCESS.get(self._owner, number)
            if found is None:
                found = self._read(number)
                PROCESS.put(self._owner, number, found, None, found.tokens.nbytes, OPEN_SHARDS, UNPACKED_BYTES)
            return found

    def offsets(self, number: int) -> Offsets:
        """Return a block's documents, which are its entries, and its sentences. Raises as `shard`."""
        documents = self._documents(number)
        if not self.index.has_sentences:
            return documents, None
        return documents, self._sentences(number, documents)

    def entry(self, number: int, document: int) -> Entry:
        """Return the entry that is a document of a block."""
        at = int(self._bounds[number]) + document
        row_id = self._row_ids[at : at + 1]
        return Entry(
            self.domains[int(self._domains[at])],
            self.generation.shards[int(shards_of(row_id)[0])],
            int(documents_of(row_id)[0]),
            int(spans_of(row_id)[0]),
            int(self._lengths[at]),
        )

    def with_fill(self, fill_id: int) -> ReplayDataset:
        """Return the same view with another token in the place of forgotten documents."""
        rows = int(self._bounds[1])
        return ReplayDataset(self.generation, self._datasets, self.tombstones, 1.0, max(1, rows), fill_id)

    def forgotten_documents(self, number: int) -> np.ndarray:
        """Return the numbers of a block's entries that are of forgotten documents, rising, (n,)."""
        first = int(self._bounds[number])
        found = [
            mine[np.isin(documents_of(self._row_ids[mine]), self.tombstones.of(content_hash))] - first
            for content_hash, mine in self._by_shard(number)
        ]
        return np.sort(np.concatenate(found))

    def release(self) -> None:
        """Let the cache evict the source shards; blocks that were read stay in memory."""
        for dataset in self._datasets:
            dataset.release()

    def fetch_ahead(self, number: int) -> None:
        """Bring the source shards of a block into the cache, as `TokenDataset.fetch_ahead` does."""
        for dataset, source in self._sources_of(number):
            if dataset.is_remote:
                dataset.fetch_ahead(source)

    def stored_bytes(self, number: int) -> int:
        """Return the bytes that the cache must hold for a block to be read: those of its remote source shards."""
        sources = self._sources_of(number)
        entries = [dataset.index.shards[source] for dataset, source in sources if dataset.is_remote]
        return sum(array.stored_bytes for entry in entries for array in entry.arrays)

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read every block, which verifies all source shards. Raises `DataError` at the first bad one."""
        for number in range(self.num_shards):
            progress(self.shard(number).tokens.nbytes)
            self.release()

    def _read(self, number: int) -> Shard:
        documents, sentences = self.offsets(number)
        tokens, forgotten = np.empty(int(documents[-1]), self.index.dtype), []
        for content_hash, mine in self._by_shard(number):
            numbers = mine - int(self._bounds[number])
            gone = np.isin(documents_of(self._row_ids[mine]), self.tombstones.of(content_hash))
            bounds = zip(documents[numbers].tolist(), documents[numbers + 1].tolist(), strict=True)
            rows = zip(bounds, gone.tolist(), self._tokens(number, content_hash, mine), strict=True)
            for (first, end), is_gone, found in rows:
                tokens[first:end] = self._fill_id if is_gone else found
            forgotten += np.stack([documents[numbers[gone]], documents[numbers[gone] + 1]], axis=1).tolist()
        ranges = np.array(sorted(forgotten), np.int64).reshape(-1, 2)
        return Shard(self.index.shards[number].tokens.name, tokens, documents, sentences, ranges)

    def _tokens(self, number: int, content_hash: str, mine: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the tokens of entries of one shard: its own, or the pinned copies."""
        if content_hash not in self._found:
            assert self._pinned is not None
            yield from (row.tokens for row in self._pinned.read(content_hash, self._row_ids[mine] & INSIDE))
            return
        dataset, source = self._found[content_hash]
        with _naming(number):
            shard = dataset.shard(source)
        starts = self._starts(mine, shard.documents)
        for start, length in zip(starts.tolist(), self._lengths[mine].tolist(), strict=True):
            yield shard.tokens[start : start + length]

    def rows(self, number: int) -> Iterator[PinnedRow]:
        """Yield the entries of a block as rows to pin. Raises as `shard`."""
        shard = self.shard(number)
        for document, (start, end) in enumerate(itertools.pairwise(shard.documents.tolist())):
            entry, sentences = self.entry(number, document), None
            if shard.sentences is not None:
                first, last = np.searchsorted(shard.sentences, [start, end])
                sentences = shard.sentences[first:last] - start
            inside = entry.document << SPAN_BITS | entry.span
            yield PinnedRow(entry.content_hash, inside, shard.tokens[start:end], sentences)

    def _documents(self, number: int) -> np.ndarray:
        first, end = self._bounds[number : number + 2]
        return np.append(0, np.cumsum(self._lengths[first:end], dtype=np.int64))

    def _sentences(self, number: int, documents: np.ndarray) -> np.ndarray:
        """Return the sentences of a block's entries; those that a span cuts begin with it."""
        found = [documents]
        for content_hash, mine in self._by_shard(number):
            if content_hash not in self._found:
                assert self._pinned is not None
                rows = self._pinned.read(content_hash, self._row_ids[mine] & INSIDE)
                firsts = documents[mine - int(self._bounds[number])].tolist()
                found += [
                    first + row.sentences for first, row in zip(firsts, rows, strict=True) if row.sentences is not None
                ]
                continue
            dataset, source = self._found[content_hash]
            with _naming(number):
                bounds, sentences = dataset.offsets(source)
            assert sentences is not None, "the index says that all have them"
            starts, numbers = self._starts(mine, bounds), mine - int(self._bounds[number])
            ends = starts + self._lengths[mine]
            # ranges (first, last) of sentences inside of each entry, one behind the other
            firsts = np.searchsorted(sentences, starts, side="right")
            counts = np.searchsorted(sentences, ends, side="left") - firsts
            each = np.repeat(np.arange(mine.size), counts)
            which = firsts[each] + np.arange(each.size) - np.repeat(np.cumsum(counts) - counts, counts)
            found.append(documents[numbers[each]] + sentences[which] - starts[each])
        return np.unique(np.concatenate(found))

    def _starts(self, which: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """Return the first tokens in their shard of entries (n,) of one shard with these offsets of documents."""
        row_ids = self._row_ids[which]
        return bounds[documents_of(row_ids)] + spans_of(row_ids) * self.generation.span_tokens

    def _by_shard(self, number: int) -> list[tuple[str, np.ndarray]]:
        """Return the source shards of a block, and the numbers of its entries in each."""
        first, end = self._bounds[number : number + 2].tolist()
        shards = shards_of(self._row_ids[first:end])
        return [
            (self.generation.shards[shard], first + np.flatnonzero(shards == shard))
            for shard in np.unique(shards).tolist()
        ]

    def _sources_of(self, number: int) -> list[tuple[TokenDataset, int]]:
        """Return the source shards of a block, as data set and number, without those of pinned entries."""
        return [self._found[content_hash] for content_hash, _ in self._by_shard(number) if content_hash in self._found]

    def _index(self, first: Index) -> ReplayIndex:
        indexes = [dataset.index for dataset in self._datasets]
        # only where all have them: pairs need the sentences of every document
        has_sentences = all(index.has_sentences for index in indexes)
        has_sentences &= self._pinned is None or self._pinned.has_sentences
        splits_sentences = any(index.num_sentences > index.num_documents for index in indexes)
        splits_sentences |= self._pinned is not None and self._pinned.splits_sentences
        dtype = token_dtype(first.vocab_size)
        sums = np.add.reduceat(self._lengths.astype(np.int64), self._bounds[:-1])
        shards = []
        for number, num_tokens in enumerate(sums.tolist()):
            name, rows = f"replay-{number:06d}", int(self._bounds[number + 1] - self._bounds[number])
            offsets = ArrayFile(f"{name}.documents", "uint64", rows + 1, 8 * (rows + 1), "")
            tokens = ArrayFile(name, dtype, num_tokens, num_tokens * np.dtype(dtype).itemsize, "")
            shards.append(ShardEntry(tokens, offsets, offsets if has_sentences else None))
        return ReplayIndex(
            first.vocab_size,
            first.eos_id,
            first.tokenizer_hash,
            tuple(shards),
            first.vocabulary,
            generation=self.generation.hash,
            splits_sentences=splits_sentences,
        )


class _naming:
    """Context that sets the number of the block in a `DamagedShard` of a source shard."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DamagedShard):
            error.number = self._number


def _in_blocks(generation: Generation) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return row ids, lengths and numbers of domains of all rows in the view's order, and the domains' names."""
    domains = tuple(generation.domains)
    parts = [generation.domains[name] for name in domains]
    row_ids = np.concatenate([part.row_ids for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    numbers = np.repeat(np.arange(len(parts), dtype=np.int16), [part.size for part in parts])
    # A random key per source shard. Rows of a domain stand in the order of their keys, which is random, too; a stable
    # sort keeps it, so a block's rows are shuffled as far as they are of one shard, and slots shuffle the rest.
    drawn = np.random.Philox(key=int(generation.hash, 16) ^ PURPOSE_BLOCKS).random_raw(len(generation.shards))
    rank = np.empty(len(generation.shards), np.int32)
    rank[np.argsort(drawn, kind="stable")] = np.arange(rank.size)
    order = np.argsort(rank[shards_of(row_ids)], kind="stable")
    return row_ids[order], lengths[order], numbers[order], domains


def _shards_by_hash(datasets: Sequence[TokenDataset]) -> dict[str, tuple[TokenDataset, int]]:
    """Return the data set and the number of each shard by its content hash; of copies the first, a local one first."""
    found: dict[str, tuple[TokenDataset, int]] = {}
    for dataset in sorted(datasets, key=lambda dataset: dataset.is_remote):
        if dataset.index.tokenizer_hash != datasets[0].index.tokenizer_hash:
            raise DataError(
                f"{dataset.location} was written with tokenizer {dataset.index.tokenizer_hash}, "
                f"{datasets[0].location} with {datasets[0].index.tokenizer_hash}",
                "one tokenizer for all data that is replayed",
                "prepare one of them again",
            )
        for number, shard in enumerate(dataset.index.shards):
            found.setdefault(shard.content_hash, (dataset, number))
    return found


def _index_of(pinned: PinnedRows | None) -> Index:
    assert pinned is not None, "`_refuse_none` has looked"
    return pinned.index


def _refuse_none(generation: Generation, datasets: Sequence[TokenDataset]) -> None:
    """Raise `DataError` for a generation without rows."""
    if not generation.num_rows or not (datasets or generation.pinned):
        raise DataError(
            "the reservoir is empty: no document of an earlier run stage is in it",
            "a reservoir with at least one document",
            "replay from the second run stage on, or raise the reservoir's capacity",
        )
