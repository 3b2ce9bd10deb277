"""The order costs no memory and mixes as well as numpy's shuffle: the same figures, over the same number of keys."""

import subprocess
import sys

import numpy as np
import pytest

from engine.data.order.permutation import Permutation
from engine.data.order.sample_order import START, SampleOrder

KEYS = 24
SIZE = 3000  # no power of two: cycle walking takes part

MEASURE = """
import sys
import numpy as np
from engine.data.order.sample_order import START, SampleOrder

samples, rows = int(sys.argv[1]), 32_768
order = SampleOrder(-(-samples // rows), lambda shards: np.full(shards.size, rows), 0, 16)
address = START
for _ in range(40):  # 40 steps in each of 3 epochs: near, and far into the epoch
    order.shard_rows(address, 1024)
    address = order.after(address, 1024)
for epoch in range(3):
    order.shard_rows(START._replace(epoch=epoch, window=order.num_windows - 1), 1024)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_billion_samples_take_the_memory_of_a_million():
    """Resident memory of a fresh process each; the samples are virtual, so it is the order's own. Bound: 5 %."""
    million, billion = (
        int(subprocess.run([sys.executable, "-c", MEASURE, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (10**6, 10**9)
    )
    assert billion < 1.05 * million, (million, billion)


def bit_bias(images: np.ndarray) -> float:
    """Largest correlation of an index's bit with an image's, in standard deviations of chance."""
    bits = np.arange(12)
    inputs = (np.arange(images.size)[:, None] >> bits & 1) - 0.5
    outputs = (images[:, None] >> bits & 1) - 0.5
    inputs, outputs = inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0)
    scale = np.linalg.norm(inputs, axis=0)[:, None] * np.linalg.norm(outputs, axis=0)
    return float(np.abs(inputs.T @ outputs / scale).max() * np.sqrt(images.size))


def distance_deviation(images: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of the distances of neighbours' images against that of uniform pairs."""
    found = np.sort(np.abs(np.diff(images))) / images.size
    expected = 1 - (1 - found) ** 2
    return float(np.abs(expected - np.arange(1, found.size + 1) / found.size).max() * np.sqrt(found.size))


def inversions(images: np.ndarray) -> float:
    """Share of pairs (of a sample of lags) in falling order; a half is chance."""
    return float(np.mean([np.mean(images[lag:] < images[:-lag]) for lag in (1, 2, 3, 5, 8, 64, 512)]))


@pytest.mark.parametrize("statistic", [bit_bias, distance_deviation, inversions])
def test_shuffles_are_inside_the_range_of_numpys(statistic):
    ours = [statistic(Permutation(SIZE, (key, 1, 0)).of(np.arange(SIZE))) for key in range(KEYS)]
    theirs = [statistic(np.random.default_rng(key).permutation(SIZE)) for key in range(10 * KEYS)]
    # one of 24 is outside 4.5 standard deviations by chance once in 6,000 times; so are numpy's own
    assert np.abs(np.array(ours) - np.mean(theirs)).max() < 4.5 * np.std(theirs)
    # the mean of ours among means of as many of numpy's
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * np.std(theirs) / np.sqrt(KEYS)


def test_batches_draw_from_as_many_shards_as_numpys_shuffle_of_the_same_window():
    """Shards in each 512 samples of windows of 32 shards of 200 rows: the mixing of so many live shards."""
    shards, rows, batch = 64, 200, 512

    def spread(numbers: np.ndarray) -> float:
        return float(
            np.mean([np.unique(part).size for part in numbers[: numbers.size // batch * batch].reshape(-1, batch)])
        )

    ours, theirs = [], []
    for key in range(KEYS):
        order = SampleOrder(shards, lambda numbers: np.full(numbers.size, rows), key, 32)
        ours.append(spread(order.shard_rows(START, 32 * rows)[:, 0]))
        generator = np.random.default_rng(key)
        theirs.append(spread(generator.permutation(np.repeat(generator.permutation(shards)[:32], rows))))
    assert min(theirs) - 0.05 <= np.mean(ours) <= max(theirs) + 0.05
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * np.std(theirs) / np.sqrt(KEYS) + 1e-9
    assert np.mean(ours) > 31.9
