"""Masks: exact numbers, fair shares, words and spans whole, and no special token masked or drawn.

The rates are held to their binomial deviations: z below 4.5 fails by chance once in 150,000 tries.
"""

import numpy as np
import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.draws import halves, words
from engine.data.objectives.masking import choose_words, mask, num_words, word_starts
from tests.engine.data.corpus import EOS, NUM_ORDINARY, SPECIAL, made_up_vocabulary

ROWS, LENGTH = 600, 128
VOCABULARY = made_up_vocabulary()


def masked(rows=ROWS, length=LENGTH, seed=0, **changes):
    """(tokens before, tokens after, real, what was made) of random rows with special tokens and padding."""
    objective = ObjectiveConfig.model_validate({"name": "masked"} | changes)
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, NUM_ORDINARY + 1, (rows, length))
    special = np.array([EOS, *SPECIAL.values()])
    where = generator.random((rows, length)) < 0.1
    tokens[where] = generator.choice(special, where.sum())
    real = np.arange(length) < generator.integers(0, length + 1, (rows, 1))
    samples = np.stack([np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.arange(rows)], axis=1)
    drawn = words(seed, 1, samples, num_words(length, objective.rate))
    seen = tokens.copy()
    made = mask(seen, real, np.zeros_like(real), objective, VOCABULARY, drawn)
    return tokens, seen, real, made


def near(share, expected, count):
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_numbers_targets_and_what_may_be_masked(unit, rate):
    tokens, seen, real, made = masked(mask_unit=unit, rate=rate)
    ordinary = VOCABULARY.ordinary_V[tokens] & real
    counts = made.weights_BM.sum(axis=1)
    wanted = [max(1, round(rate * int(n))) if n else 0 for n in ordinary.sum(axis=1)]
    if unit == "word":  # the last words may not fit
        assert (counts <= wanted).all()
        assert counts.sum() > 0.98 * sum(wanted)
    else:
        assert counts.tolist() == wanted
    for b in range(ROWS):
        positions = made.masked_BM[b][made.weights_BM[b] > 0]
        assert (np.diff(positions) > 0).all()
        assert ordinary[b, positions].all()
        assert (made.targets_BM[b][: positions.size] == tokens[b, positions]).all()
        untouched = np.delete(np.arange(LENGTH), positions)
        assert (seen[b, untouched] == tokens[b, untouched]).all()
        assert not made.masked_BM[b][positions.size :].any()


def test_eighty_ten_ten_and_random_tokens_are_uniform_over_ordinary_ones():
    tokens, seen, _, made = masked(rows=4000)
    rows, places = np.nonzero(made.weights_BM)
    at = made.masked_BM[rows, places]
    before, after = tokens[rows, at], seen[rows, at]
    as_mask = after == SPECIAL["mask"]
    other = ~as_mask & (after != before)
    # a random token is the same as before once in 899
    assert near(as_mask.mean(), 0.8, rows.size)
    assert near(other.mean(), 0.1 * (1 - 1 / NUM_ORDINARY), rows.size)
    assert VOCABULARY.ordinary_V[after[other]].all()
    histogram = np.bincount(after[other] * 10 // (NUM_ORDINARY + 1), minlength=10)
    assert all(near(count / other.sum(), 0.1, other.sum()) for count in histogram)
    # what a token becomes does not depend on where it stands
    assert all(near(as_mask[places == m].mean(), 0.8, (places == m).sum()) for m in range(8))


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_of_all_and_nothing(mask_share, random_share):
    tokens, seen, _, made = masked(mask_share=mask_share, random_share=random_share)
    rows, places = np.nonzero(made.weights_BM)
    at = made.masked_BM[rows, places]
    if mask_share:
        assert (seen[rows, at] == SPECIAL["mask"]).all()
    elif random_share:
        assert (seen[rows, at] != tokens[rows, at]).mean() > 0.99
    else:
        assert (seen == tokens).all()


def test_every_place_is_equally_likely():
    tokens = np.ones((8000, 20), np.int64)
    samples = np.stack([np.zeros(8000, np.int64), np.zeros(8000, np.int64), np.arange(8000)], axis=1)
    objective = ObjectiveConfig(name="masked", mask_share=1.0, random_share=0.0)
    real = np.ones(tokens.shape, bool)
    mask(tokens, real, ~real, objective, VOCABULARY, words(5, 1, samples, num_words(20, 0.15)))
    rates = (tokens == SPECIAL["mask"]).mean(axis=0)
    assert all(near(rate, 3 / 20, 8000) for rate in rates)


def words_by_hand(tokens, real):
    """Words of one row as lists of positions, token by token."""
    found = []
    for t, token in enumerate(tokens.tolist()):
        if not (real[t] and 1 <= token <= NUM_ORDINARY):
            continue
        before = tokens[t - 1] if t else EOS
        goes_on = token % 3 == 0 and 1 <= before <= NUM_ORDINARY and before % 10 != 0 and t > 0
        if goes_on:
            found[-1].append(t)
        else:
            found.append([t])
    return found


def test_words_are_masked_whole_as_a_plain_loop_does_it():
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, NUM_ORDINARY + 1, (50, 40))
    tokens[generator.random(tokens.shape) < 0.5] = 3  # long words
    real = np.arange(40) < generator.integers(1, 41, (50, 1))
    allowed = VOCABULARY.ordinary_V[tokens] & real
    begins = word_starts(tokens, allowed, np.zeros_like(real), VOCABULARY)
    keys = generator.integers(0, 2**32, tokens.shape).astype(np.uint32)
    counts = generator.integers(0, 9, 50)
    chosen = choose_words(keys, allowed, begins, np.minimum(counts, allowed.sum(axis=1)))
    for b in range(50):
        expected, left = [], min(int(counts[b]), int(allowed[b].sum()))
        for word in sorted(words_by_hand(tokens[b], real[b]), key=lambda word: keys[b, word[0]]):
            if len(word) <= left:
                expected += word
                left -= len(word)
        assert np.flatnonzero(chosen[b]).tolist() == sorted(expected)


def test_a_document_begins_a_word():
    tokens = np.full((1, 6), 3)
    real, starts = np.ones((1, 6), bool), np.array([[False, False, True, False, False, False]])
    assert word_starts(tokens, real, starts, VOCABULARY)[0].tolist() == [True, False, True, False, False, False]


def test_spans_have_their_mean_length_and_are_seen_as_one():
    tokens, seen, real, made = masked(rows=2000, mask_unit="span", mean_span_length=3.0)
    full = (VOCABULARY.ordinary_V[tokens] & real).sum(axis=1) > 100
    lengths, mixed = [], 0
    for b in np.flatnonzero(full):
        ordinary = np.flatnonzero(VOCABULARY.ordinary_V[tokens[b]] & real[b])
        inside = np.isin(ordinary, made.masked_BM[b][made.weights_BM[b] > 0])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(int), [0]])))
        lengths += (edges[1::2] - edges[::2]).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            places = ordinary[start:end]
            if (np.diff(places) == 1).all():
                kinds = seen[b, places] == SPECIAL["mask"]
                mixed += kinds.any() and not kinds.all()
    assert np.mean(lengths) == pytest.approx(3.0, abs=0.15)  # counts are rounded to whole spans
    assert mixed == 0


def test_a_row_without_an_ordinary_token_has_no_target():
    tokens = np.full((2, 8), EOS)
    objective = ObjectiveConfig(name="masked")
    made = mask(
        tokens, np.ones((2, 8), bool), np.zeros((2, 8), bool), objective, VOCABULARY, np.ones((2, 9), np.uint64)
    )
    assert not made.weights_BM.any()
    assert halves(np.ones((1, 1), np.uint64)).tolist() == [[1, 0]]
