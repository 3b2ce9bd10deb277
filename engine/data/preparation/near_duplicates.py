"""Which documents are nearly the same: MinHash of their runs of tokens, and locality-sensitive hashing.

Broder 1997, "On the Resemblance and Containment of Documents"; bands as in Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", 3.4. A document is the set of its runs of `RUN` tokens, so no language needs words; the similarity is
Jaccard's, estimated from `NUM_PERMUTATIONS` minima, which `rensa` computes. Documents that share a band and whose
estimate reaches the threshold are joined, and so is what is joined to either; the first of each group stays.
Invariant: a signature depends on the document alone and the choice on the documents' order alone, never on workers.
"""

from __future__ import annotations

import numpy as np

RUN = 5
NUM_PERMUTATIONS = 128
SEED = 1
RECALL = 0.99
"""Least probability that a pair at the threshold shares a band."""

_PAIRS_AT_ONCE = 1 << 16
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def algorithm() -> str:
    """What signatures depend on besides the documents, for the recipe."""
    from rensa.rensa import RMinHash

    return f"rensa {RMinHash.ALGORITHM_VERSION}, runs of {RUN}, {NUM_PERMUTATIONS} permutations"


def signatures(documents: list[np.ndarray], num_permutations: int) -> np.ndarray:
    """(documents, num_permutations) uint32 minima of each document's runs; ids (n,), n from 1."""
    if not documents or not num_permutations:
        return np.empty((len(documents), num_permutations), np.uint32)
    from rensa.rensa import RMinHash

    runs = [_runs(ids) for ids in documents]
    offsets = np.concatenate([[0], np.cumsum([item.size for item in runs])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(runs), offsets, num_permutations, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _runs(ids: np.ndarray) -> np.ndarray:
    """uint64 hashes of all runs of `RUN` tokens; a shorter document is one run."""
    width = min(RUN, ids.size)
    words = ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(ids.size - width + 1, np.uint64)
    for at in range(width):
        found = _mixed(found ^ words[at : at + found.size])
    return found


def _mixed(words: np.ndarray) -> np.ndarray:
    """Spreads every bit over the word (Fibonacci multiplication with a fold); wraps around as uint64 does."""
    words = words * _MULTIPLIER
    return words ^ (words >> np.uint64(29))


def near_duplicates(signatures_NK: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) bool: documents that are nearly the same as an earlier one of their group. K permutations."""
    count, permutations = signatures_NK.shape
    if count < 2:
        return np.zeros(count, bool)
    rows = rows_per_band(threshold, permutations)
    leader = np.arange(count)
    for first in range(0, permutations - rows + 1, rows):
        for a, b in _pairs(signatures_NK, signatures_NK[:, first : first + rows], threshold).tolist():
            _join(leader, a, b)
    return np.array([_leader(leader, i) != i for i in range(count)], bool)


def rows_per_band(threshold: float, permutations: int = NUM_PERMUTATIONS) -> int:
    """The longest bands with which a pair at the threshold is still seen with probability `RECALL`."""
    seen = [1 - (1 - threshold**rows) ** (permutations // rows) for rows in range(1, permutations + 1)]
    return max((rows for rows, probability in enumerate(seen, 1) if probability >= RECALL), default=1)


def _pairs(signatures_NK: np.ndarray, band_NR: np.ndarray, threshold: float) -> np.ndarray:
    """(pairs, 2) documents with the same band whose estimate reaches the threshold: each with the first of its bucket
    and with the one before."""
    keys = np.zeros(len(band_NR), np.uint64)
    for column in band_NR.T:
        keys = _mixed(keys ^ column.astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(keys[order]) != 0))
    bucket = np.repeat(np.arange(begins.size), np.diff(np.append(begins, order.size)))
    places = np.setdiff1d(np.arange(order.size), begins)
    others = np.stack([order[begins[bucket[places]]], order[places - 1]], axis=1)
    pairs = np.unique(np.concatenate([np.stack([other, order[places]], axis=1) for other in others.T]), axis=0)
    least = threshold * signatures_NK.shape[1]
    blocks = np.array_split(pairs, len(pairs) // _PAIRS_AT_ONCE + 1)
    return np.concatenate(
        [
            block[np.count_nonzero(signatures_NK[block[:, 0]] == signatures_NK[block[:, 1]], axis=1) >= least]
            for block in blocks
        ]
    )


def _join(leader: np.ndarray, a: int, b: int) -> None:
    a, b = _leader(leader, a), _leader(leader, b)
    leader[max(a, b)] = min(a, b)


def _leader(leader: np.ndarray, item: int) -> int:
    while leader[item] != item:
        leader[item] = leader[leader[item]]
        item = int(leader[item])
    return item
