"""Near duplicates: candidates compared run by run, by any worker, and the documents that are left out.

A document is left out where an earlier one, left out itself or not, has the similarity asked for or more. Bands are
worked through one after the other, so that a pair that has been decided is not compared again; pairs go to workers in
batches of bounded size.
Invariant: what is left out follows from the documents in their order, never from workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engine.corpus.encoded_chunks import Records, read
from engine.corpus.minhash import candidates, runs, similarity
from engine.corpus.pool import Pool

_TOKENS_AT_ONCE = 4 << 20
"""Tokens of the documents of one batch, which a worker holds; one pair may have more."""


@dataclass(frozen=True)
class Comparison:
    """Pairs to compare, and the documents that they are of."""

    numbers_P2: np.ndarray
    """Numbers of the documents among all."""
    indices_P2: np.ndarray
    """Numbers of the documents in `records`, counted from the first record on."""
    records: list[Records]
    dtype: np.dtype
    threshold: float


LocateRecords = Callable[[np.ndarray], list[tuple[np.ndarray, Records]]]
"""(n,) rising numbers of documents -> for each part file the indices of those that it holds, and their records."""


def near_duplicates(
    keys_of_band: Callable[[int], np.ndarray],
    num_bands: int,
    lengths: np.ndarray,
    left_out: np.ndarray,
    locate: LocateRecords,
    dtype: np.dtype,
    threshold: float,
    pool: Pool,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Return True for documents nearly equal to an earlier one, (N,) bool. Those that are `left_out` (N,) take no part.

    `keys_of_band` gives the keys (N,) of a band; `progress` is told bands done and in all. Raises `DataError`.
    """
    left = np.flatnonzero(~left_out)
    near = np.zeros(left_out.size, bool)
    rejected = np.empty(0, np.int64)
    for band in range(num_bands):
        pairs = left[candidates(keys_of_band(band)[left])]  # (pairs, 2), numbers among all documents
        # a pair as one number, a * N + b, so that sets of pairs are compared by np.isin
        codes = pairs @ np.array([left_out.size, 1])
        # a later document that an earlier band has decided, or a pair that was rejected, is not compared again
        pairs = pairs[~near[pairs[:, 1]] & ~np.isin(codes, rejected)]
        tasks = _batches(pairs, lengths, locate, dtype, threshold)
        others = []
        for compared, same in pool.run(compare, tasks):
            near[compared[same, 1]] = True
            others.append(compared[~same] @ np.array([left_out.size, 1]))
        rejected = np.concatenate([rejected, *others])
        progress(band + 1, num_bands)
    return near


def compare(task: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (P, 2), and True for those that reach the threshold (P,). Raises `DataError`: a damaged part."""
    documents = [record.tokens for records in task.records for record in read(records, task.dtype)]
    found = [np.unique(runs(tokens[:-1])) for tokens in documents]  # without the end of text
    same = [similarity(found[a], found[b]) >= task.threshold for a, b in task.indices_P2.tolist()]
    return task.numbers_P2, np.array(same, bool)


def _batches(
    pairs: np.ndarray, lengths: np.ndarray, locate: LocateRecords, dtype: np.dtype, threshold: float
) -> Iterator[Comparison]:
    """Yield the pairs (P, 2), those of one earlier document side by side, in batches of `_TOKENS_AT_ONCE` tokens."""
    ends = np.cumsum(lengths[pairs].sum(axis=1))
    first = 0
    while first < len(pairs):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _TOKENS_AT_ONCE, side="right")))
        numbers = np.unique(pairs[first:last])
        located = locate(numbers)
        index = np.empty(numbers.size, np.int64)
        # `locate` sorts by part file: index into `numbers` -> index into the records in the order that `compare` reads
        index[np.concatenate([which for which, _ in located])] = np.arange(numbers.size)
        indices = index[np.searchsorted(numbers, pairs[first:last])]
        yield Comparison(pairs[first:last], indices, [records for _, records in located], dtype, threshold)
        first = last
