"""Masked language modelling: the choice of tokens to predict, and what the model sees instead of them.

Devlin et al. 2019, section 3.1: of a share of the tokens, 80 % are seen as the mask, 10 % as a random token, 10 % as
they are. The number is exact for each row (the share of its ordinary tokens, rounded), not a coin for each token.
What is masked as a whole is a token, a word (whole-word masking of the reference code), or a span: lengths as in
Raffel et al. 2020, seen as mask or not as a whole as in Joshi et al. 2020. Only ordinary tokens are masked or drawn.
Pure functions of tokens and random words, over a whole micro-batch at once.

B batch (rows), T sequence dimension, M most masked tokens of a row, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.config.objectives import num_masked
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.draws import below, choose, halves, order
from engine.data.objectives.spans import noise_mask
from engine.data.tokenizer.vocabulary import Vocabulary


class Masked(NamedTuple):
    """`masked_BM` int64 positions, rising, then 0; `targets_BM` int64; `weights_BM` float32, 0 behind the last."""

    masked_BM: np.ndarray
    targets_BM: np.ndarray
    weights_BM: np.ndarray


def num_words(length: int, rate: float) -> int:
    """Return the number of random words of a row of T tokens: half a word for each, and one for each masked one."""
    return -(-length // 2) + num_masked(length, rate)


def mask(
    tokens_BT: np.ndarray,
    real_BT: np.ndarray,
    starts_BT: np.ndarray,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    words_BW: np.ndarray,
) -> Masked:
    """Choose tokens, and write into `tokens_BT` (int64) what the model sees instead.

    `real_BT` is false in padding and in forgotten documents, `starts_BT` true where a document (or segment) begins;
    `words_BW` are the rows' random words. Rows without an ordinary token have no targets.
    """
    length = tokens_BT.shape[1]
    most = num_masked(length, objective.rate)
    # (B, T) a key for each token; then, for each masked token, two words: its action, and its random token
    keys_BT, rest = halves(words_BW[:, : -(-length // 2)])[:, :length], halves(words_BW[:, -(-length // 2) :])
    allowed_BT = vocabulary.ordinary_V.take(tokens_BT) & real_BT
    others_B = np.bincount(np.flatnonzero(~allowed_BT) // length, minlength=len(tokens_BT))  # few: fast to count
    counts_B = _wanted(length, objective.rate)[length - others_B]
    if objective.mask_unit == "token":
        chosen_BT = choose(keys_BT, allowed_BT, counts_B)
    elif objective.mask_unit == "word":
        begins_BT = word_starts(tokens_BT, allowed_BT, starts_BT, vocabulary)
        chosen_BT = choose_words(keys_BT, allowed_BT, begins_BT, counts_B)
    else:
        chosen_BT = _choose_spans(keys_BT, allowed_BT, counts_B, objective.mean_span_length)
    # everything below goes by numbers over all rows: two indices per token cost several times as much
    flat = np.flatnonzero(chosen_BT)
    found_B = np.diff(np.searchsorted(flat, np.arange(len(tokens_BT) + 1) * length))
    rows = np.repeat(np.arange(len(tokens_BT)), found_B)
    # number of each within its row: found (2, 1) are numbered (0, 1, 0)
    positions = np.arange(flat.size) - np.repeat(np.cumsum(found_B) - found_B, found_B)
    masked_BM = np.zeros((len(tokens_BT), most), np.int64)
    targets_BM, weights_BM = np.zeros_like(masked_BM), np.zeros(masked_BM.shape, np.float32)
    slots = rows * most + positions  # (B, M) flattened
    masked_BM.put(slots, flat - rows * length)
    targets_BM.put(slots, tokens_BT.take(flat))
    weights_BM.put(slots, 1.0)
    drawn, deciders = rows * rest.shape[1] + 2 * positions, 0
    if objective.mask_unit == "span":  # the first token of a span decides for all of it
        goes_on = np.append(False, (np.diff(flat) == 1) & (np.diff(rows) == 0))[: flat.size]
        firsts = np.maximum.accumulate(np.where(goes_on, 0, np.arange(flat.size)))
        deciders = 2 * (positions[firsts] - positions)
    _replace(tokens_BT, flat, rest.take(drawn + deciders), rest.take(drawn + 1), objective, vocabulary)
    return Masked(masked_BM, targets_BM, weights_BM)


@lru_cache(maxsize=16)
def _wanted(length: int, rate: float) -> np.ndarray:
    """Return a table of `num_masked`, (T + 1,): the masked tokens of a row by its number of ordinary ones."""
    return np.array([0, *(num_masked(count, rate) for count in range(1, length + 1))])


def _replace(
    tokens_BT: np.ndarray,
    flat: np.ndarray,
    actions: np.ndarray,
    drawn: np.ndarray,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
) -> None:
    """Write masks and random tokens at the positions `flat` over all rows; `actions` and `drawn` are uint32, one of
    each per masked token."""
    shares = np.array([objective.mask_share, objective.mask_share + objective.random_share])
    # shares as limits of a uint32: 0.8 is below 3,435,973,837. In uint64, since a share of 1 is 2^32 itself
    as_mask, as_other = np.minimum(np.round(shares * 2**32), 2**32).astype(np.uint64)
    assert vocabulary.mask is not None, "checked when the sampler was made"
    ordinary = vocabulary.ordinary_ids
    random = ordinary.take(below(drawn, ordinary.size))
    kept = np.where(actions < as_other, random, tokens_BT.take(flat))
    tokens_BT.put(flat, np.where(actions < as_mask, vocabulary.mask, kept))


def word_starts(
    tokens_BT: np.ndarray, allowed_BT: np.ndarray, starts_BT: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """Mark tokens that begin a word, by the vocabulary or because no part of the word precedes them: (B, T) bool."""
    begins_BT = vocabulary.begins_word_V[tokens_BT] | starts_BT
    begins_BT[:, 0] = True
    begins_BT[:, 1:] |= vocabulary.ends_word_V[tokens_BT[:, :-1]] | ~allowed_BT[:, :-1]
    return begins_BT & allowed_BT


def choose_words(
    keys_BT: np.ndarray, allowed_BT: np.ndarray, begins_BT: np.ndarray, counts_B: np.ndarray
) -> np.ndarray:
    """Choose words in random order, each if it still fits into its row's count, until none fits: (B, T) bool."""
    num_rows, length = keys_BT.shape
    # the words in random order: their first tokens, then how many tokens each has
    ordered_BW = order(keys_BT, begins_BT)[:, : max(1, int(begins_BT.sum(axis=1).max(initial=0)))]
    numbers_BT = np.cumsum(begins_BT, axis=1) - 1  # of the word in its row
    flat = (np.arange(num_rows)[:, None] * length + numbers_BT)[allowed_BT]
    sizes_BW = np.bincount(flat, minlength=num_rows * length).reshape(num_rows, length)
    which_BW = np.take_along_axis(numbers_BT, ordered_BW, axis=1)
    # columns behind a row's last word are given a size that never fits
    in_order = np.arange(ordered_BW.shape[1]) < begins_BT.sum(axis=1)[:, None]
    sizes_BW = np.where(in_order, np.take_along_axis(sizes_BW, which_BW, axis=1), length + 1)
    taken_BW = np.zeros(sizes_BW.shape, bool)
    left_B, begin_B = counts_B.copy(), np.zeros(num_rows, np.int64)
    while True:  # as many words as fit in a row, then past the one that does not
        ahead = np.arange(sizes_BW.shape[1]) >= begin_B[:, None]
        fits = ahead & (sizes_BW <= left_B[:, None])
        if not fits.any():
            break
        first_B = np.where(fits.any(axis=1), fits.argmax(axis=1), sizes_BW.shape[1])
        onward = np.arange(sizes_BW.shape[1]) >= first_B[:, None]
        reached = onward & (np.cumsum(np.where(onward, sizes_BW, 0), axis=1) <= left_B[:, None])
        taken_BW |= reached
        left_B -= np.where(reached, sizes_BW, 0).sum(axis=1)
        begin_B = first_B + reached.sum(axis=1)
    rows = np.broadcast_to(np.arange(num_rows)[:, None], taken_BW.shape)[taken_BW]
    word_taken = np.zeros((num_rows, length), bool)
    word_taken[rows, which_BW[taken_BW]] = True
    # number -1 stands before a row's first word, where nothing is allowed: any index does
    return allowed_BT & np.take_along_axis(word_taken, np.maximum(numbers_BT, 0), axis=1)


def _choose_spans(keys_BT: np.ndarray, allowed_BT: np.ndarray, counts_B: np.ndarray, mean_length: float) -> np.ndarray:
    """Choose spans over the allowed places of each row, as if these stood side by side: (B, T) bool."""
    totals_B = allowed_BT.sum(axis=1)
    # no more spans than tokens between them, or two of them would be one
    spans_B = np.clip(np.round(counts_B / mean_length).astype(np.int64), 1, np.maximum(1, totals_B - counts_B))
    dense_BT = noise_mask(keys_BT, totals_B, counts_B, spans_B)
    # allowed (1, 0, 1, 1) stand side by side at (0, 0, 1, 2)
    positions_BT = np.maximum(np.cumsum(allowed_BT, axis=1) - 1, 0)
    return allowed_BT & np.take_along_axis(dense_BT, positions_BT, axis=1)
