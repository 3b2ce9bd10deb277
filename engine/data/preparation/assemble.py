"""Finished parts -> which documents stay, and the shards of each output folder.

Invariant: what stays and where shards end follows from the documents in their order, never from who encoded them; a
shard is written by one worker from the parts that hold its documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data.preparation.near_duplicates import near_duplicates
from engine.data.preparation.parts import Documents, load
from engine.data.preparation.statistics import Statistics
from engine.data.shards.index import ShardEntry
from engine.data.shards.writer import Compression, cut_into_shards, write_shard
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
class ShardTask:
    """One shard to write: the documents (by number) of each part that it takes."""

    folder: Path
    number: int
    pieces: list[tuple[Path, np.ndarray]]
    with_sentences: bool
    compression: Compression


def removed(documents: Documents, how: Deduplicate, similarity: float) -> Removed:
    """What is left out of some documents in order; the first of the same stays."""
    count = documents.lengths.size
    exact, near = np.zeros(count, bool), np.zeros(count, bool)
    if how != "none":
        order = np.lexsort((documents.hashes[:, 1], documents.hashes[:, 0]))  # stable: equal ones keep their order
        exact[order[1:]] = (documents.hashes[order[1:]] == documents.hashes[order[:-1]]).all(axis=1)
    if how == "near":
        left = np.flatnonzero(~exact)
        near[left] = near_duplicates(documents.signatures[left], similarity)
    return Removed(exact, near)


def shard_tasks(
    folder: Path,
    parts: list[Path],
    counts: np.ndarray,
    documents: Documents,
    chosen: np.ndarray,
    shard_tokens: int,
    with_sentences: bool,
    compression: Compression,
) -> list[ShardTask]:
    """The shards of one folder, made of the `chosen` documents (numbers, rising) of parts with `counts` documents."""
    bounds = cut_into_shards(documents.lengths[chosen], shard_tokens)
    ends = np.cumsum(counts)
    tasks = []
    for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        inside = chosen[first:last]
        owners = np.searchsorted(ends, inside, side="right")
        pieces = [
            (parts[part], inside[owners == part] - (int(ends[part - 1]) if part else 0)) for part in np.unique(owners)
        ]
        tasks.append(ShardTask(folder, number, pieces, with_sentences, compression))
    return tasks


def write(task: ShardTask) -> tuple[Path, int, ShardEntry]:
    """Writes a shard; its folder, number and entry of the index. Raises `DataError`: no room, or a part is damaged."""
    tokens, lengths, sentences = [], [], []
    at = 0
    for path, numbers in task.pieces:
        part = load(path)
        if part is None:
            raise DataError(f"{path} is damaged or gone", "the file as it was written", "run the same command again")
        mine = np.zeros(part.documents.lengths.size, bool)
        mine[numbers] = True
        tokens.append(part.tokens[np.repeat(mine, part.documents.lengths)])
        lengths.append(part.documents.lengths[mine])
        firsts = at + np.cumsum(lengths[-1]) - lengths[-1]
        counts = part.documents.sentences
        sentences.append(part.sentence_starts[np.repeat(mine, counts)] + np.repeat(firsts, counts[mine]))
        at += tokens[-1].size
    starts = np.concatenate(sentences) if task.with_sentences else None
    joined = np.concatenate(tokens)
    little = joined.astype(joined.dtype.newbyteorder("<"), copy=False)
    shape = (little, np.concatenate(lengths), starts)
    return task.folder, task.number, write_shard(task.folder, task.number, *shape, task.compression)


def statistics(documents: Documents, side: np.ndarray, removed: Removed, empty: int) -> Statistics:
    """Counts of the documents of one `side` (n,) bool that stay, and of what was left out of it."""
    kept = np.flatnonzero(side & ~removed.any)
    lengths = documents.lengths[kept]
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
    )
    found.lengths.update(dict(zip(powers.tolist(), counts.tolist(), strict=True)))
    return found
