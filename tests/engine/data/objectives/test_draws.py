"""Random words belong to a sample, not to the batch it is read in, and look random."""

import itertools

import numpy as np
import pytest

from engine.data.objectives.draws import below, choose, dropout_keys, halves, order, words

SAMPLES = np.array([(e, w, s) for e in range(2) for w in range(2) for s in range(20)], np.int64)


@pytest.mark.parametrize("num_words", [1, 4, 7, 64])
def test_words_are_the_same_in_every_batch(num_words):
    whole = words(3, 1, SAMPLES, num_words)
    for start, count in ((0, 1), (5, 3), (18, 10), (79, 1)):
        assert np.array_equal(words(3, 1, SAMPLES[start : start + count], num_words), whole[start : start + count])
    shuffled = np.random.default_rng(0).permutation(len(SAMPLES))
    assert np.array_equal(words(3, 1, SAMPLES[shuffled], num_words), whole[shuffled])
    assert words(3, 1, SAMPLES[:0], num_words).shape == (0, num_words)


def test_no_word_comes_twice_and_seeds_and_purposes_have_their_own():
    drawn = np.concatenate([words(seed, purpose, SAMPLES, 8) for seed in range(3) for purpose in range(3)])
    assert np.unique(drawn).size == drawn.size


def test_words_are_those_of_numpys_philox():
    key = np.random.SeedSequence((3, 1, 0, 1)).generate_state(2, np.uint64)
    stream = np.random.Philox(key=key).random_raw(20 * 8).reshape(20, 8)
    assert np.array_equal(words(3, 1, SAMPLES[20:40], 8), stream)


def test_every_bit_of_a_word_is_fair():
    """10,240 coins a bit: standard deviation 0.0049; 64 bits stay within 4.5 of it but once in 2,300 seeds."""
    drawn = words(0, 0, SAMPLES, 128).ravel()
    rates = [np.mean(drawn >> np.uint64(bit) & np.uint64(1)) for bit in range(64)]
    assert np.abs(np.array(rates) - 0.5).max() < 4.5 * 0.5 / drawn.size**0.5


def test_every_subset_is_equally_likely_and_only_what_is_allowed_is_chosen():
    """Of 4 allowed places, 2: six subsets; 6,000 draws each expect 1,000 with a deviation of 29."""
    allowed = np.broadcast_to(np.array([1, 0, 1, 1, 0, 1], bool), (6000, 6))
    samples = np.stack([np.zeros(6000, np.int64), np.zeros(6000, np.int64), np.arange(6000)], axis=1)
    chosen = choose(halves(words(0, 0, samples, 3)), allowed, np.full(6000, 2))
    assert (chosen.sum(axis=1) == 2).all()
    assert not (chosen & ~allowed).any()
    found, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(found) == 6
    assert np.abs(counts - 1000).max() < 4.5 * 29


def test_counts_may_differ_by_row_and_be_nothing():
    keys = halves(words(0, 0, SAMPLES[:4], 4))
    counts = np.array([0, 8, 3, 1])
    assert choose(keys, np.ones((4, 8), bool), counts).sum(axis=1).tolist() == counts.tolist()
    assert choose(keys, np.zeros((4, 8), bool), np.zeros(4, np.int64)).sum() == 0


def test_of_equal_keys_the_earlier_places_are_chosen():
    generator = np.random.default_rng(0)
    keys = generator.choice(np.array([0, 1, 2, 2**32 - 1], np.uint32), (200, 12))
    allowed = generator.random((200, 12)) < 0.7
    counts = generator.integers(0, allowed.sum(axis=1) + 1)
    chosen = choose(keys, allowed, counts)
    for row in range(200):
        ranked = sorted(np.flatnonzero(allowed[row]).tolist(), key=lambda place, row=row: (keys[row, place], place))
        assert np.flatnonzero(chosen[row]).tolist() == sorted(ranked[: counts[row]])


def test_order_is_by_key_with_what_is_not_allowed_last():
    keys, allowed = np.array([[5, 2**32 - 1, 0, 7]], np.uint32), np.array([[True, True, False, True]])
    assert order(keys, allowed)[0, :3].tolist() == [0, 3, 1]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_below_reaches_everything_and_nothing_else(limit):
    drawn = below(halves(words(0, 0, SAMPLES, 128)).ravel(), limit)
    assert (drawn.min(), drawn.max()) == (0, limit - 1)
    assert below(np.array([0, 2**32 - 1], np.uint32), limit).tolist() == [0, limit - 1]


def test_dropout_keys_are_a_function_of_seed_step_and_address():
    keys = dropout_keys(1, 2, SAMPLES)
    assert keys.dtype == np.int64
    assert np.array_equal(dropout_keys(1, 2, SAMPLES[7:9]), keys[7:9])
    every = np.concatenate([dropout_keys(*which, SAMPLES) for which in itertools.product(range(3), range(3))])
    assert np.unique(every).size == every.size
    assert np.unique(dropout_keys(0, 0, np.full((3, 3), -1))).size == 1
