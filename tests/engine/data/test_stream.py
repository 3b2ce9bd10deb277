"""The order visits every row once per epoch, is the same from everywhere, and mixes inside its windows."""

import numpy as np
import pytest

from engine.data.stream import SampleId, SampleOrder

ROWS = np.array([5, 0, 3, 7, 1, 4, 0, 6, 2, 8])


def order(seed=0, window_shards=3, rows=ROWS):
    return SampleOrder(rows, seed, window_shards)


@pytest.mark.parametrize("window_shards", [1, 2, 3, 10, 50])
def test_an_epoch_visits_each_row_of_each_shard_once(window_shards):
    stream = order(window_shards=window_shards)
    everything = sorted((shard, row) for shard, rows in enumerate(ROWS) for row in range(rows))
    for epoch in range(3):
        places = stream.places(epoch * stream.samples_per_epoch, stream.samples_per_epoch)
        assert sorted(map(tuple, places.tolist())) == everything


def test_the_order_is_the_same_from_every_position():
    whole = order().places(0, 100)
    for start in range(0, 100, 7):
        fresh = order()
        assert np.array_equal(fresh.places(start, 100 - start), whole[start:])
        assert np.array_equal(fresh.addresses(start, 1)[0], order().addresses(0, 100)[start])


def test_addresses_and_positions_are_each_others_inverse():
    stream = order()
    addresses = [SampleId(*item) for item in stream.addresses(0, 110).tolist()]
    assert len(set(addresses)) == 110
    assert addresses == sorted(addresses)
    for position, sample in enumerate(addresses):
        assert stream.address(position) == sample
        assert order().position(sample) == position


@pytest.mark.parametrize("sample", [SampleId(0, 4, 0), SampleId(0, -1, 0), SampleId(0, 0, 99), SampleId(0, 0, -1)])
def test_an_address_that_does_not_exist_is_refused(sample):
    with pytest.raises(ValueError, match="of"):
        order().position(sample)


def test_seeds_and_epochs_have_orders_of_their_own():
    # seed 1 epoch 0 is not seed 0 epoch 1, as it would be with `seed + epoch`
    orders = {
        order(seed).places(epoch * ROWS.sum(), int(ROWS.sum())).tobytes() for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_a_window_holds_as_many_shards_as_asked():
    stream = order(window_shards=3)
    addresses, places = stream.addresses(0, stream.samples_per_epoch), stream.places(0, stream.samples_per_epoch)
    for window in np.unique(addresses[:, 1]):
        assert np.unique(places[addresses[:, 1] == window, 0]).size <= 3
    assert len({tuple(np.unique(places[addresses[:, 1] == w, 0])) for w in np.unique(addresses[:, 1])}) == 4


def test_a_far_position_of_a_large_data_set_costs_no_more_than_a_near_one():
    rows = np.full(30_000, 32_000)  # about a trillion tokens at length 1,024
    stream = order(rows=rows, window_shards=16)
    far = 7 * stream.samples_per_epoch + 900_000_001
    places = stream.places(far, 512)
    assert np.unique(places, axis=0).shape == (512, 2)
    assert stream.position(stream.address(far)) == far
    assert len(stream._epochs) == 1  # nothing but the epoch asked for was laid out
