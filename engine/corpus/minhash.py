"""Candidates of near duplicates (MinHash of runs of tokens, and locality-sensitive hashing), and their similarity.

Broder 1997, "On the Resemblance and Containment of Documents"; bands as in Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", 3.4. A document is the set of its runs of `RUN` tokens, so no language needs words; the similarity is
Jaccard's. `NUM_PERMUTATIONS` minima, which `rensa` computes, are cut into bands, and documents that agree in a band are
candidates. Candidates are compared run by run: an estimate from the minima would blur the threshold by 0.035 (one
standard deviation), so it decides nothing here. A pair below the threshold is never accepted; one at the threshold is a
candidate with probability `RECALL` or more.
Invariant: the keys of bands depend on the document and the threshold alone.
"""

from __future__ import annotations

import numpy as np

RUN = 5
NUM_PERMUTATIONS = 128
SEED = 1
RECALL = 0.99
"""Least probability that a pair at the threshold shares a band."""

_DOCUMENTS_AT_ONCE = 4096
"""The library gives minima as lists: some 5 KB per document."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def algorithm() -> str:
    """Return a name of everything that the choice depends on besides documents and threshold, for the recipe."""
    from rensa.rensa import RMinHash

    return f"rensa {RMinHash.ALGORITHM_VERSION}, runs of {RUN}, {NUM_PERMUTATIONS} permutations, candidates compared"


def band_keys(documents: list[np.ndarray], threshold: float) -> np.ndarray:
    """Return keys (documents, bands) uint64; documents with a key in common are candidates. Ids (n,), n from 1."""
    rows = rows_per_band(threshold)
    keys = np.zeros((len(documents), NUM_PERMUTATIONS // rows), np.uint64)
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        minima = signatures(documents[first : first + _DOCUMENTS_AT_ONCE])
        some = keys[first : first + _DOCUMENTS_AT_ONCE]
        for band in range(keys.shape[1]):
            # a band's key is a hash of its minima in order: equal only where all of them are
            for column in minima[:, band * rows : (band + 1) * rows].T:
                some[:, band] = _mixed(some[:, band] ^ column.astype(np.uint64))
    return keys


def signatures(documents: list[np.ndarray]) -> np.ndarray:
    """Return the minima of each document's runs, (documents, NUM_PERMUTATIONS) uint32."""
    if not documents:
        return np.empty((0, NUM_PERMUTATIONS), np.uint32)
    from rensa.rensa import RMinHash

    found = [runs(ids) for ids in documents]
    offsets = np.concatenate([[0], np.cumsum([item.size for item in found])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(found), offsets, NUM_PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def runs(ids: np.ndarray) -> np.ndarray:
    """Return the hashes of all runs of `RUN` tokens, uint64; a shorter document is one run."""
    width = min(RUN, ids.size)
    # plus 1, since the hash of 0 is 0: runs of token 0 would be equal at any length
    words = ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(ids.size - width + 1, np.uint64)
    for at in range(width):
        found = _mixed(found ^ words[at : at + found.size])
    return found


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard similarity of two documents, given as the sorted distinct hashes of their runs."""
    common = np.intersect1d(a, b, assume_unique=True).size
    return common / (a.size + b.size - common)


def rows_per_band(threshold: float) -> int:
    """Return the most rows of a band with which a pair at the threshold is still found with probability `RECALL`."""
    lengths = range(1, NUM_PERMUTATIONS + 1)
    # 128 minima, threshold 0.8: bands of 6 minima, of which there are 21
    seen = [1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) for rows in lengths]
    return max((rows for rows, probability in zip(lengths, seen, strict=True) if probability >= RECALL), default=1)


def candidates(keys_N: np.ndarray) -> np.ndarray:
    """Return pairs (pairs, 2) of documents with the same key, the earlier one first, in order.

    Each with the first that has its key and with the one before it; more would be a number of pairs that grows with
    the square of the documents that share a passage.
    """
    # keys (7, 5, 7, 7): order (1, 0, 2, 3), firsts at indices 0 and 1, buckets (0, 1, 1, 1). Indices 2 and 3 hold
    # documents 2 and 3: pairs with the first of their bucket (0, 2), (0, 3), and with the one before (0, 2), (2, 3)
    order = np.argsort(keys_N, kind="stable")
    is_first = np.append(True, np.diff(keys_N[order]) != 0)[: order.size]
    bucket = np.cumsum(is_first) - 1
    indices = np.flatnonzero(~is_first)
    others = (order[np.flatnonzero(is_first)[bucket[indices]]], order[indices - 1])
    codes = np.unique(np.concatenate([other * keys_N.size + order[indices] for other in others]))
    return np.stack(np.divmod(codes, max(1, keys_N.size)), axis=1)


def _mixed(words: np.ndarray) -> np.ndarray:
    """Spread every bit over the word (Fibonacci multiplication with a fold); wraps around as uint64 does."""
    words = words * _MULTIPLIER
    return words ^ (words >> np.uint64(29))
