"""Random words of a sample: a pure function of (seed, purpose, epoch, window, slot), whoever reads it and when.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is counter-based. Its key is made of
(seed, purpose, epoch, window), and the samples of a window own ranges of its counter, one behind the other; so
a micro-batch, whose samples follow one another, is drawn in one call. Invariant: neither the number of ranks nor
the micro-batch size, the order of calls or a restart changes a word.

B batch (rows), W words per row, T sequence dimension.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from engine.data.order.permutation import mix_array

PURPOSE_OBJECTIVE = int.from_bytes(b"mask")
"""Masks, spans and splits of a sample."""
PURPOSE_PAIRS = int.from_bytes(b"pairs")
"""Second segments that are exchanged."""
PURPOSE_DROPOUT = int.from_bytes(b"dropout")

_WORDS_PER_COUNT = 4
_LARGEST = 2**32 - 1


def words(seed: int, purpose: int, samples_B3: np.ndarray, num_words: int) -> np.ndarray:
    """Return uniform random words of the samples (epoch, window, slot), none negative: (B, num_words) uint64."""
    drawn = words_of_no_sample(len(samples_B3), num_words, len(samples_B3))
    write_words(seed, purpose, samples_B3, drawn, np.arange(len(samples_B3)))
    return drawn[:, :num_words]


def words_of_no_sample(num_rows: int, num_words: int, num_samples: int) -> np.ndarray:
    """Return an array for the words of `num_rows` rows, at least `num_words` of each: 0 behind the first `num_samples`
    rows, which `write_words` has to fill."""
    found = np.empty((num_rows, -(-num_words // _WORDS_PER_COUNT) * _WORDS_PER_COUNT), np.uint64)
    found[num_samples:] = 0
    return found


def write_words(seed: int, purpose: int, samples_B3: np.ndarray, into_NW: np.ndarray, rows_B: np.ndarray) -> None:
    """Write the random words of samples into rows `rows_B` of an array of `words_of_no_sample`."""
    # one value of Philox's counter gives four words: 6 words take 2 values, so slot 5 begins at value 10
    counts = into_NW.shape[1] // _WORDS_PER_COUNT
    for start, end in _runs(samples_B3):
        epoch, window, slot = samples_B3[start].tolist()
        stream = np.random.Philox(key=_key(seed, purpose, epoch, window), counter=slot * counts)
        drawn = stream.random_raw((end - start) * into_NW.shape[1]).reshape(end - start, -1)
        first, last = rows_B[start], rows_B[end - 1]
        # rows that follow one another are copied in half the time
        into_NW[slice(first, last + 1) if last - first == end - start - 1 else rows_B[start:end]] = drawn


def choose(keys_BT: np.ndarray, allowed_BT: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """Choose `counts_B` of the allowed positions of each row, every such subset equally likely: (B, T) bool.

    `keys_BT` are uniform uint32; the positions with the smallest keys are taken. Equal keys (one pair in 2^32) prefer
    the earlier position. `counts_B` is at most the number of allowed positions.
    """
    # the key of each row's last position: sorting 32 bits takes half the time of keys and positions together
    ranked_BT = np.sort(np.where(allowed_BT, keys_BT, np.uint32(_LARGEST)), axis=1)
    last_B = ranked_BT[np.arange(len(keys_BT)), np.maximum(counts_B, 1) - 1]
    chosen_BT = (keys_BT <= last_B[:, None]) & allowed_BT & (counts_B > 0)[:, None]
    if np.count_nonzero(chosen_BT) == counts_B.sum():
        return chosen_BT
    for row in np.flatnonzero(np.count_nonzero(chosen_BT, axis=1) > counts_B):  # its last position has an equal
        chosen_BT[row] = False
        chosen_BT[row, order(keys_BT[row : row + 1], allowed_BT[row : row + 1])[0, : counts_B[row]]] = True
    return chosen_BT


def order(keys_BT: np.ndarray, allowed_BT: np.ndarray) -> np.ndarray:
    """Return each row's positions by rising key, allowed ones first: (B, T) int64."""
    positions_T = np.arange(keys_BT.shape[1], dtype=np.uint64)
    combined_BT = keys_BT.astype(np.uint64) << np.uint64(31) | positions_T  # 63 bits: bit 63 is for what is not allowed
    combined_BT |= (~allowed_BT).astype(np.uint64) << np.uint64(63)
    combined_BT.sort(axis=1)  # much faster than argsort
    return (combined_BT & np.uint64(0x7FFFFFFF)).astype(np.int64)


def halves(words_BW: np.ndarray) -> np.ndarray:
    """Split words into twice as many uint32, (B, 2 W), the low half first."""
    return np.ascontiguousarray(words_BW, "<u8").view("<u4")


def below(words32: np.ndarray, limits: np.ndarray | int) -> np.ndarray:
    """Map each uint32 word to an int64 from 0 to limit - 1; biased by less than limit / 2^32.

    Lemire 2019, "Fast Random Integer Generation in an Interval", without its rejection step.
    """
    return (words32.astype(np.uint64) * np.asarray(limits, np.uint64) >> np.uint64(32)).astype(np.int64)


def dropout_keys(seed: int, step: int, samples_B3: np.ndarray) -> np.ndarray:
    """Return the keys of dropout of each row of a step, (B,) int64 of any bits. Padding rows have keys, too.

    A pure function of seed, step and the samples' addresses.
    """
    base = np.random.SeedSequence((seed, PURPOSE_DROPOUT, step)).generate_state(1, np.uint64)
    keys_B = np.repeat(base, len(samples_B3))
    # 2^64 divided by the golden ratio is added, since the mix of 0 is 0
    for column in samples_B3.T:
        keys_B = mix_array(keys_B ^ mix_array(column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return keys_B.view(np.int64)


@lru_cache(maxsize=64)
def _key(seed: int, purpose: int, epoch: int, window: int) -> np.ndarray:
    return np.random.SeedSequence((seed, purpose, epoch, window)).generate_state(2, np.uint64)


def _runs(samples_B3: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, end) of the runs of rows whose slots follow one another in one window."""
    if not len(samples_B3):
        return []
    steps = np.diff(samples_B3, axis=0)
    cuts = np.flatnonzero((steps != (0, 0, 1)).any(axis=1)) + 1
    edges = [0, *cuts.tolist(), len(samples_B3)]
    return list(itertools.pairwise(edges))
