"""The order visits every row once per epoch, is the same from everywhere, and mixes inside its windows."""

import numpy as np
import pytest

from engine.data.order.sample_order import START, SampleId, SampleOrder

ROWS = np.array([5, 0, 3, 7, 1, 4, 0, 6, 2, 8])
TOTAL = int(ROWS.sum())


def order(seed=0, window_shards=3, rows=ROWS):
    return SampleOrder(rows.size, lambda shards: rows[shards], seed, window_shards)


@pytest.mark.parametrize("window_shards", [1, 2, 3, 10, 50])
def test_an_epoch_visits_each_row_of_each_shard_once(window_shards):
    stream = order(window_shards=window_shards)
    everything = sorted((shard, row) for shard, rows in enumerate(ROWS) for row in range(rows))
    for epoch in range(3):
        first = stream.after(START, epoch * TOTAL)
        assert first.epoch == epoch
        shard_rows = stream.shard_rows(first, TOTAL)
        assert sorted(map(tuple, shard_rows.tolist())) == everything


def test_the_order_is_the_same_from_every_sample():
    whole, addresses = order().shard_rows(START, 100), order().addresses(START, 100)
    for start in range(0, 100, 7):
        fresh = order()
        sample = fresh.after(START, start)
        assert np.array_equal(fresh.shard_rows(sample, 100 - start), whole[start:])
        assert SampleId(*addresses[start].tolist()) == sample == fresh.check(sample)


def test_addresses_rise_and_each_stands_once():
    addresses = [SampleId(*item) for item in order().addresses(START, 110).tolist()]
    assert len(set(addresses)) == 110
    assert addresses == sorted(addresses)
    for count in (0, 1, 40, 109):
        assert order().after(addresses[0], count) == addresses[count]


@pytest.mark.parametrize("sample", [SampleId(0, 4, 0), SampleId(0, -1, 0), SampleId(0, 0, 99), SampleId(0, 0, -1)])
def test_an_address_that_does_not_exist_is_refused(sample):
    with pytest.raises(ValueError, match="of"):
        order().check(sample)


def test_seeds_and_epochs_have_orders_of_their_own():
    # seed 1 epoch 0 is not seed 0 epoch 1, as it would be with `seed + epoch`
    orders = {order(seed).shard_rows(SampleId(epoch, 0, 0), TOTAL).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_a_window_holds_as_many_shards_as_asked():
    stream = order(window_shards=3)
    addresses, shard_rows = stream.addresses(START, TOTAL), stream.shard_rows(START, TOTAL)
    for window in np.unique(addresses[:, 1]):
        assert np.unique(shard_rows[addresses[:, 1] == window, 0]).size <= 3
    assert len({tuple(np.unique(shard_rows[addresses[:, 1] == w, 0])) for w in np.unique(addresses[:, 1])}) == 4


def test_a_far_sample_of_a_large_data_set_costs_no_more_than_a_near_one():
    counted = []

    def count(shards):
        counted.extend(shards.tolist())
        return np.full(shards.size, 32_000)

    stream = SampleOrder(30_000, count, 0, 16)  # about a trillion tokens at length 1,024
    far = stream.check(SampleId(7, 900, 511_900))
    shard_rows = stream.shard_rows(far, 512)
    assert np.unique(shard_rows, axis=0).shape == (512, 2)
    assert len(stream._epochs) == 1  # nothing but the epoch and the windows asked for was laid out
    assert len(counted) == 2 * 16
