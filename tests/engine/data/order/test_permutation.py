"""The permutation is a bijection, the two ways to compute it agree, and its shuffles look like chance."""

import itertools

import numpy as np
import pytest

from engine.data.order.permutation import LARGEST_SIZE, Permutation


@pytest.mark.parametrize("key", [(0,), (7, 1, 2)])
def test_it_is_a_bijection_for_every_small_size(key):
    for size in itertools.chain(range(1, 130), (255, 256, 257, 1000, 1023, 1024, 1025, 4097)):
        images = Permutation(size, key).of(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size)), size


def test_one_at_a_time_equals_all_at_once():
    for size in (1, 2, 3, 5, 17, 1000, 2**16, 2**16 + 1):
        permutation = Permutation(size, (3, size))
        indices = np.unique(np.linspace(0, size - 1, 200).astype(np.int64))
        assert [permutation(int(i)) for i in indices] == permutation.of(indices).tolist()


@pytest.mark.parametrize("size", [3_000_000_000, 2**32, 2**32 + 1, 2**53 + 3, 10**18, LARGEST_SIZE])
def test_samples_beyond_32_bits_are_distinct_in_range_and_exact(size):
    permutation = Permutation(size, (1, 2, 3))
    generator = np.random.default_rng(0)
    runs = [np.arange(start, start + 5000) for start in (0, size // 2, size - 5000)]
    indices = np.unique(np.concatenate([*runs, generator.integers(0, size, 20_000)]))
    images = permutation.of(indices)
    assert images.min() >= 0
    assert images.max() < size
    assert np.unique(images).size == indices.size
    few = indices[:: indices.size // 100]
    assert [permutation(int(i)) for i in few] == permutation.of(few).tolist()
    # uniform over the range: the mean of k uniform draws has standard deviation size / sqrt(12 k); five of them
    assert abs(images.mean() / size - 0.5) < 5 / np.sqrt(12 * images.size)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_shuffle_of_a_few_is_equally_likely(size):
    keys = 2400
    counts = dict.fromkeys(itertools.permutations(range(size)), 0)
    for key in range(keys):
        counts[tuple(map(Permutation(size, (key,)), range(size)))] += 1
    expected = keys / len(counts)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(counts) - 1
    # chi-square has mean f and variance 2 f; five standard deviations
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_where_each_index_goes_looks_like_numpys_shuffle():
    size, keys = 64, 3000
    ours, theirs = np.zeros((size, size)), np.zeros((size, size))
    for key in range(keys):
        ours[np.arange(size), Permutation(size, (key,)).of(np.arange(size))] += 1
        theirs[np.arange(size), np.random.default_rng(key).permutation(size)] += 1
    expected, freedom = keys / size, (size - 1) ** 2
    for counts in (ours, theirs):  # numpy's own passes the same bound
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    size = 10_000
    images = Permutation(size, (5,)).of(np.arange(size))
    # a random order has two neighbouring images (difference 1) about twice on average; Poisson: 20 is out of reach
    assert (np.abs(np.diff(images)) == 1).sum() < 20
    # lag-one correlation of random draws has standard deviation 1 / sqrt(n)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / np.sqrt(size)


def test_another_key_gives_another_order():
    orders = {
        tuple(Permutation(50, (seed, 1, epoch)).of(np.arange(50)).tolist()) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_shape_is_kept_and_nothing_is_an_answer_to_nothing():
    permutation = Permutation(100, (0,))
    assert permutation.of(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation.of(np.arange(0)).size == 0
