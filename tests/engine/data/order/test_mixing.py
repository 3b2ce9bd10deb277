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
