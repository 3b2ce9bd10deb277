"""Spans: exact amounts, every way to cut equally likely."""

from collections import Counter

import numpy as np
import pytest

from engine.data.objectives.draws import halves, words
from engine.data.objectives.spans import noise_mask


def masks(rows, length, total, noise, spans, seed=0):
    samples = np.stack([np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.arange(rows)], axis=1)
    keys = halves(words(seed, 1, samples, -(-length // 2)))[:, :length]
    full = np.full(rows, 1)
    return noise_mask(keys, total * full, noise * full, spans * full)


@pytest.mark.parametrize(("total", "noise", "spans"), [(20, 3, 1), (20, 6, 3), (20, 10, 10), (13, 4, 4), (2, 1, 1)])
def test_exact_amounts_what_is_kept_first_and_noise_last(total, noise, spans):
    found = masks(500, 20, total, noise, spans)
    assert (found.sum(axis=1) == noise).all()
    heads = found & ~np.pad(found[:, :-1], ((0, 0), (1, 0)))
    assert (heads.sum(axis=1) == spans).all()
    assert not found[:, 0].any()
    assert found[:, total - 1].all()
    assert not found[:, total:].any()


def test_every_way_to_cut_is_equally_likely():
    """7 tokens, 3 of noise in 2 spans: 2 ways to cut the noise, 3 what is kept; 6,000 draws expect 1,000 each."""
    counts = Counter(tuple(row) for row in masks(6000, 7, 7, 3, 2).tolist())
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * 29


def test_rows_of_different_lengths_in_one_batch():
    keys = np.random.default_rng(0).integers(0, 2**32, (3, 12)).astype(np.uint32)
    found = noise_mask(keys, np.array([12, 0, 5]), np.array([4, 0, 1]), np.array([2, 0, 1]))
    assert found.sum(axis=1).tolist() == [4, 0, 1]
    assert found[2].tolist() == [False] * 4 + [True] + [False] * 7
