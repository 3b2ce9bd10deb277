"""Encoded chunks to documents that stay, and to the shards of each output folder.

Invariant: which documents stay, their folders and the ends of shards follow from the documents and their part files
alone, never from the worker that encoded them; a shard is written by one worker from one range of each part file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.corpus.encoded_chunks import Documents, Records, joined, lines_of, read, record_begins
from engine.corpus.near_duplicates import near_duplicates
from engine.corpus.pool import Pool
from engine.corpus.spread import ChunkKey, spread_keys, stored_order
from engine.corpus.statistics import Statistics
from engine.data.shards.document_weights import COLUMN
from engine.data.shards.ids import from_array, to_array
from engine.data.shards.index import ShardEntry
from engine.data.shards.writer import Compression, cut_into_shards, write_shard
from engine.data.visible import visible
from engine.errors import DataError

Deduplicate = Literal["none", "exact", "near"]


@dataclass(frozen=True)
class Removed:
    """(n,) bool each: documents that are left out because an earlier one is the same, or nearly."""

    exact: np.ndarray
    near: np.ndarray

    @property
    def any(self) -> np.ndarray:
        return self.exact | self.near


@dataclass(frozen=True)
class EncodedFile:
    """A finished part file, the key of its chunk among those of the sources, and the facts about its documents."""

    path: Path
    key: ChunkKey
    domain: str
    documents: Documents
    bands: np.ndarray
    """(n, bands) uint64"""


class Corpus:
    """The documents of all parts, numbered in the order of the sources, and where they lie."""

    def __init__(self, parts: list[EncodedFile], dtype: np.dtype) -> None:
        """Number the documents of all part files, whose tokens are of `dtype`."""
        self.dtype = dtype
        self.documents = joined([part.documents for part in parts])
        counts = [part.documents.lengths.size for part in parts]
        orders = [stored_order(part.key, part.documents.is_validation) for part in parts]
        self._paths = [part.path for part in parts]
        self._ends = np.cumsum(counts)
        self._bands = [part.bands for part in parts]
        self._begins = np.concatenate(
            [record_begins(part.documents, order, dtype.itemsize) for part, order in zip(parts, orders, strict=True)]
        )
        self._keys = np.concatenate([spread_keys(part.key, count) for part, count in zip(parts, counts, strict=True)])

    @property
    def num_bands(self) -> int:
        return self._bands[0].shape[1]

    def keys_of_band(self, band: int) -> np.ndarray:
        """Return the documents' keys of one band, (N,) uint64."""
        return np.concatenate([bands[:, band] for bands in self._bands])

    def line(self, number: int) -> str:
        """Return file and line of a document. Raises `OSError`."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        return lines_of(self._paths[part])[number - int(self._ends[part - 1] if part else 0)]

    def spread(self, numbers: np.ndarray) -> np.ndarray:
        """Return rising numbers (n,) of documents in the order in which shards take them."""
        return numbers[np.argsort(self._keys[numbers], kind="stable")]

    def locate(self, numbers: np.ndarray) -> list[tuple[np.ndarray, Records]]:
        """Return, for each file, the indices into `numbers` (n,) of the documents that it holds, and their records."""
        # ends of files (3, 5): documents 0 to 2 are of file 0, 3 and 4 of file 1; sorted by file, then by byte in it
        owners = np.searchsorted(self._ends, numbers, side="right")
        order = np.lexsort((self._begins[numbers], owners))
        cuts = np.flatnonzero(np.diff(owners[order])) + 1
        return [
            (
                which,
                Records(
                    self._paths[owners[which[0]]],
                    self._begins[numbers[which]],
                    self.documents.lengths[numbers[which]],
                    self.documents.sentences[numbers[which]],
                    self.documents.id_bytes[numbers[which]],
                ),
            )
            for which in np.split(order, cuts)
            if which.size
        ]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    folder: Path
    number: int
    num_documents: int
    parts: list[tuple[np.ndarray, Records]]
    """Places in the shard of the documents that each part has of it, and where they lie there."""
    dtype: np.dtype
    with_sentences: bool
    compression: Compression
    weights: np.ndarray | None = None
    """Weights of the documents, (num_documents,) float64; None where none are kept."""


def refuse_repeated_ids(corpus: Corpus) -> None:
    """Raise `DataError` where two documents have one id, naming the lines of both."""
    hashes = corpus.documents.id_hashes
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones keep their order
    again = np.flatnonzero((hashes[order[1:]] == hashes[order[:-1]]).all(axis=1))
    if not again.size:
        return
    # of all that repeat the one before them, the first in the order of the sources
    at = again[np.argmin(order[again + 1])]
    first, second = int(order[at]), int(order[at + 1])
    _, records = corpus.locate(np.array([second]))[0]
    (name,) = from_array(to_array([next(iter(read(records, corpus.dtype))).id]))
    more = f" ({again.size - 1:,} more ids are repeated)" if again.size > 1 else ""
    raise DataError(
        f"{corpus.line(second)} has the id {visible(name)!r}, as {corpus.line(first)} has{more}",
        "an id of its own for each document",
        "mend the sources, or name another --id-key, or none: ids are then SHARD_HASH:ROW",
    )


def removed(
    corpus: Corpus, how: Deduplicate, similarity: float, pool: Pool, progress: Callable[[int, int], None]
) -> Removed:
    """Return the documents that are left out; the first of equal ones stays. Raises `DataError`."""
    count = corpus.documents.lengths.size
    exact, near = np.zeros(count, bool), np.zeros(count, bool)
    if how != "none":
        hashes = corpus.documents.hashes
        # neighbours in the order of their hashes: all but the first of a run of equal ones go
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones keep their order
        exact[order[1:]] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    if how == "near":
        shape = (corpus.keys_of_band, corpus.num_bands, corpus.documents.lengths, exact)
        near = near_duplicates(*shape, corpus.locate, corpus.dtype, similarity, pool, progress)
    return Removed(exact, near)


def shard_bounds(corpus: Corpus, chosen: np.ndarray, shard_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `chosen` documents (rising numbers) in the order of their folder, and the first one of each shard."""
    order = corpus.spread(chosen)
    return order, cut_into_shards(corpus.documents.lengths[order], shard_tokens)


def shard_tasks(
    folder: Path, corpus: Corpus, order: np.ndarray, bounds: np.ndarray, with_sentences: bool, compression: Compression
) -> Iterator[ShardTask]:
    """Yield the shards of one folder one by one: all together they would name each part file once for each shard."""
    for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        # in a generator: the records of a shard are looked up when a worker is free, not before
        parts = corpus.locate(order[first:last])
        weights = corpus.documents.weights
        own = weights[order[first:last]] if weights.size else None
        yield ShardTask(folder, number, last - first, parts, corpus.dtype, with_sentences, compression, own)


def write(task: ShardTask) -> tuple[Path, int, ShardEntry]:
    """Write a shard; return its folder, number and entry of the index.

    Raises `DataError`: no room, or a part is damaged.
    """
    tokens: list[np.ndarray] = [np.empty(0)] * task.num_documents
    starts: list[np.ndarray] = [np.empty(0)] * task.num_documents
    names = [b""] * task.num_documents
    for indices, records in task.parts:
        for index, record in zip(indices.tolist(), read(records, task.dtype), strict=True):
            tokens[index], starts[index], names[index] = record
    lengths = np.array([document.size for document in tokens], np.int64)
    firsts = np.cumsum(lengths) - lengths  # first token of each document in the shard
    sentences = None
    if task.with_sentences:
        counts = [item.size for item in starts]
        # from positions in the documents to positions in the shard
        sentences = np.concatenate(starts).astype(np.int64) + np.repeat(firsts, counts)
    ids = to_array(names) if any(names) else None
    content = (np.concatenate(tokens), lengths, sentences)
    columns = {} if task.weights is None else {COLUMN: task.weights}
    entry = write_shard(task.folder, task.number, *content, task.compression, ids, columns)
    return task.folder, task.number, entry


def statistics(documents: Documents, side: np.ndarray, removed: Removed, empty: int, empty_unspelt: int) -> Statistics:
    """Return the counts of the documents of one `side` (n,) bool that stay, and of those left out of it.

    `empty` documents without a token, with `empty_unspelt` bytes that no token spells, are counted on this side.
    """
    kept = np.flatnonzero(side & ~removed.any)
    lengths = documents.lengths[kept]
    # frexp gives m * 2^e with m from 0.5 to 1, so e - 1 is the power of two at or below: 5 has 2, 8 has 3
    powers, counts = np.unique(np.frexp(lengths)[1] - 1, return_counts=True)
    found = Statistics(
        documents=kept.size,
        empty_documents=empty,
        tokens=int(lengths.sum()),
        text_bytes=int(documents.text_bytes[kept].sum()),
        unknown_tokens=int(documents.unknown[kept].sum()),
        sentences=int(documents.sentences[kept].sum()),
        exact_duplicates=int(np.count_nonzero(side & removed.exact)),
        near_duplicates=int(np.count_nonzero(side & removed.near)),
        unspelt_bytes=int(documents.unspelt[kept].sum()) + empty_unspelt,
        left_out_bytes=empty_unspelt,
    )
    found.lengths.update(dict(zip(powers.tolist(), counts.tolist(), strict=True)))
    return found
