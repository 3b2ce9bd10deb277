"""Every prefix of a mixture has each source's exact share to within less than one sample, whatever the weights."""

import random

import numpy as np
import pytest

from engine.config.rules.data import LONGEST_PERIOD, whole_parts
from engine.data.order.mixing import Mixing


def errors(parts: tuple[int, ...], length: int) -> np.ndarray:
    """(length + 1, K): samples of each source before each position, less its exact share."""
    sources = Mixing(parts, [None] * len(parts)).of(0, length)
    counts = np.vstack([np.zeros(len(parts)), np.cumsum(sources[:, None] == np.arange(len(parts)), axis=0)])
    return counts - np.arange(length + 1)[:, None] * np.array(parts) / sum(parts)


def test_no_prefix_is_off_by_a_sample_and_every_period_is_exact():
    generator = random.Random(0)
    for _ in range(150):
        limit = generator.choice([3, 20, 300])
        parts = whole_parts([generator.randint(1, limit) for _ in range(generator.randint(1, 9))])
        found = errors(parts, 2 * sum(parts) + 5)
        assert np.abs(found).max() < 1, parts
        # a stretch is the difference of two prefixes; for two sources the error of either is the other's
        assert np.ptp(found, axis=0).max() < 2
        assert np.abs(found[sum(parts)]).max() < 1e-9


def test_it_is_a_function_of_the_position_alone():
    mixing = Mixing((5, 3, 1), [None] * 3)
    whole = mixing.of(0, 500)
    for position in range(0, 480, 7):
        assert np.array_equal(Mixing((5, 3, 1), [None] * 3).of(position, 20), whole[position : position + 20])
        assert np.array_equal(mixing.counts(position), np.bincount(whole[:position], minlength=3))
    far = 10**15 + 4
    assert mixing.counts(far).sum() == far
    assert np.abs(mixing.counts(far) - far * np.array([5, 3, 1]) / 9).max() < 1
    assert np.array_equal(mixing.of(9 * 10**14, 30), whole[:30])


def test_a_source_that_runs_dry_leaves_the_others_in_their_proportions():
    mixing = Mixing((3, 2, 1), [30, None, 40])
    sources = mixing.of(0, 1200)
    assert np.bincount(sources, minlength=3).tolist() == [30, 1130, 40]
    dry = int(np.flatnonzero(sources == 0)[-1])
    behind = np.cumsum(sources[dry + 1 : dry + 60] == 1)
    assert np.abs(behind - np.arange(1, 60) * 2 / 3).max() < 1
    assert set(sources[-900:]) == {1}
    for position in (0, dry, dry + 1, 100, 1199):
        assert np.array_equal(mixing.counts(position), np.bincount(sources[:position], minlength=3))
        assert np.array_equal(mixing.of(position, 1), sources[position : position + 1])
    assert mixing.num_samples is None


def test_a_stream_of_limited_sources_ends_when_all_are_dry():
    mixing = Mixing((1, 7, 2), [11, 23, 5])
    assert mixing.num_samples == 39
    assert np.bincount(mixing.of(0, 39)).tolist() == mixing.counts(39).tolist() == [11, 23, 5]


def test_weights_become_whole_numbers():
    assert whole_parts([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_parts([1.0, 1.0, 1.0]) == (1, 1, 1)
    assert whole_parts([0.3333, 0.6666]) == (1, 2)
    assert whole_parts([1e-3, 1]) == (1, 1000)
    rounded = whole_parts([1234567, 7654321, 99999])
    assert LONGEST_PERIOD % sum(rounded) == 0
    exact = np.array([1234567, 7654321, 99999]) / (1234567 + 7654321 + 99999)
    assert np.abs(np.array(rounded) / sum(rounded) - exact).max() < 1 / LONGEST_PERIOD
    for weights, message in (([1.0, -1.0], "no finite number above 0"), ([1.0, 1e-7], "less than 1/65,536 of the sum")):
        with pytest.raises(ValueError, match=message):
            whole_parts(weights)


def exact_shares(table: list[tuple[int, list[int]]], length: int) -> np.ndarray:
    """(length + 1, K): exact share of each source before each position."""
    shares = np.zeros((length, len(table[0][1])))
    for (first, parts), end in zip(table, [*(row[0] for row in table[1:]), length], strict=True):
        shares[first:end] = np.array(parts) / sum(parts)
    return np.vstack([np.zeros(shares.shape[1]), np.cumsum(shares, axis=0)])


def test_weights_that_change_leave_every_prefix_within_a_sample_of_the_sum_of_the_shares():
    generator = random.Random(3)
    for _ in range(250):
        num_sources, table, position = generator.randint(1, 7), [], 0
        for _ in range(generator.randint(2, 6)):
            least, most = generator.choice([(0, 4), (1, 9), (1, 60)])
            parts = [generator.randint(least, most) for _ in range(num_sources)]
            table.append((position, parts if any(parts) else [1] * num_sources))
            position += generator.choice([1, 2, 5, 17, 100, 700])
        mixing, length = Mixing(table[0][1], [None] * num_sources, table[1:]), position + 150
        sources = mixing.of(0, length)
        counts = np.vstack([np.zeros(num_sources), np.cumsum(sources[:, None] == np.arange(num_sources), axis=0)])
        assert np.abs(counts - exact_shares(table, length)).max() < 1 - 1e-9, table
        for position in generator.sample(range(length), 5):
            assert np.array_equal(mixing.counts(position), counts[position])
            assert np.array_equal(mixing.of(position, 20)[: length - position], sources[position : position + 20])


def test_before_the_first_change_and_at_any_distance_a_table_is_the_plain_mixture():
    table = [(10**9, (1, 1, 3)), (10**12 + 7, (0, 2, 1))]
    mixing, plain = Mixing((5, 3, 1), [None] * 3, table), Mixing((5, 3, 1), [None] * 3)
    assert np.array_equal(mixing.of(0, 5000), plain.of(0, 5000))
    far = 10**13
    exact = 10**9 * np.array([5, 3, 1]) / 9 + (10**12 + 7 - 10**9) * np.array([1, 1, 3]) / 5
    exact += (far - 10**12 - 7) * np.array([0, 2, 1]) / 3
    assert mixing.counts(far).sum() == far
    assert np.abs(mixing.counts(far) - exact).max() < 1.01
    assert 0 not in mixing.of(far, 500)


def test_a_mixture_that_begins_anew_knows_what_was_given_and_moves_nothing_of_it():
    first = Mixing((3, 2, 1), [30, None, 40])
    counts = first.counts(100)
    second = Mixing((1, 1, 8), [30, None, 40], start=100, counts=counts.tolist())
    assert np.array_equal(second.counts(100), counts)
    sources = second.of(100, 200)
    assert np.array_equal(second.counts(300), counts + np.bincount(sources, minlength=3))
    assert (second.counts(300)[[0, 2]] == [30, 40]).all(), "limits count what was given before"
    dry = int(np.flatnonzero(sources == 2)[-1])
    behind = np.cumsum(sources[:dry] == 2)
    assert np.abs(behind - np.arange(1, dry + 1) * 8 / 9).max() < 1, "of 1 : 8, since the first is at its limit"
