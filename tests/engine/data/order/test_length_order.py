"""Samples of a step are of similar length, each comes once in an epoch, and the order follows from the position."""

import itertools

import numpy as np
import pytest

from engine.data.order.length_order import POOL_STEPS, LengthOrder
from engine.data.order.sample_order import START, SampleId, SampleOrder

STEP = 4


def order_of(counts, seed=3, window_shards=2, step=STEP):
    """An order of shards with these numbers of rows, whose lengths are 1 to 64."""
    lengths = [np.random.default_rng(number).integers(1, 65, count) for number, count in enumerate(counts)]

    def lengths_of(shard_rows_N2):
        return np.array([lengths[shard][row] for shard, row in shard_rows_N2.tolist()], np.int64)

    counted = np.array(counts, np.int64)
    return LengthOrder(len(counts), lambda shards: counted[shards], seed, window_shards, lengths_of, step), lengths_of


@pytest.mark.parametrize(("counts", "step"), [([7, 5, 9], 4), ([1, 0, 2], 5), ([700, 333, 41], 4), ([600], 1)])
def test_an_epoch_visits_each_row_once(counts, step):
    order, _ = order_of(counts, step=step)
    total = sum(counts)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    rows = order.shard_rows(START, 3 * total)
    for epoch in range(3):
        found = [tuple(row) for row in rows[epoch * total : (epoch + 1) * total].tolist()]
        assert set(found) == everything
        assert len(found) == total
    if total > 20:
        assert rows[:total].tolist() != rows[total : 2 * total].tolist(), "epochs differ"
        assert rows.tolist() != order_of(counts, seed=4, step=step)[0].shard_rows(START, 3 * total).tolist()


def test_any_part_of_the_order_is_that_of_the_whole():
    counts = [300, 133, 41]
    whole = order_of(counts)[0].shard_rows(START, 1000)
    fresh = order_of(counts)[0]
    draw, at, address = np.random.default_rng(0), 0, START
    while at < 1000:
        count = min(int(draw.integers(1, 90)), 1000 - at)
        assert fresh.shard_rows(address, count).tolist() == whole[at : at + count].tolist()
        at, address = at + count, fresh.after(address, count)
    assert (
        order_of(counts)[0].shard_rows(SampleId(1, 1, 7), 5).tolist() == fresh.shard_rows(SampleId(1, 1, 7), 5).tolist()
    )


def test_samples_of_equal_length_meet_as_they_were_shuffled():
    count = 150 * STEP
    counted = np.array([count], np.int64)
    plain = SampleOrder(1, lambda shards: counted[shards], 3, 2).shard_rows(START, count)
    order = LengthOrder(1, lambda shards: counted[shards], 3, 2, lambda rows: np.full(len(rows), 7), STEP)
    steps = [rows.reshape(-1, STEP, 2).tolist() for rows in (plain, order.shard_rows(START, count))]
    assert sorted(steps[0]) == sorted(steps[1])
    assert steps[0] != steps[1]


def test_steps_hold_samples_of_similar_length_in_every_epoch():
    counts = [2051]  # a step that begins in one epoch ends in the next
    order, lengths_of = order_of(counts)
    lengths = lengths_of(order.shard_rows(START, 4 * 2052)).reshape(-1, STEP)
    spreads = lengths.max(1) - lengths.min(1)
    # but for those at the ends of epochs, whose pools are small
    assert np.count_nonzero(spreads > 64 * 4 / POOL_STEPS + 4) <= 12
    padded = np.ceil(lengths.max(1) / 8) * 8 * STEP
    assert lengths.sum() / padded.sum() > 0.85
    means = lengths.mean(1)
    assert np.corrcoef(means[1:], means[:-1])[0, 1] < 0.1, "steps are shuffled"
    for first, second in itertools.pairwise(range(0, 2048, 512)):
        assert abs(means[first : first + 512].mean() - means[second : second + 512].mean()) < 5
