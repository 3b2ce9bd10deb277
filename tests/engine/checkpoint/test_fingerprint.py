"""The fingerprint does not see the layout, and sees everything else."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.checkpoint import fingerprint as fingerprints
from engine.checkpoint.fingerprint import combine, fingerprint, partial_sum, range_sum
from engine.parallel.sharding import ParameterSpec
from tests.engine.checkpoint.threads import ThreadedRanks
from tests.engine.checkpoint.worlds import World, layout_of, random_state, small_model


def of(layout, zero_stage, whole, change=None):
    world = World(layout_of(*layout), zero_stage, small_model())
    world.fill(whole)
    if change is not None:
        change(world)
    tensor = world.layout.tensor
    ranks = zip(world.writers, world.shards, strict=True)
    return combine([partial_sum(shards, world.placements[w.stage], w, tensor) for w, shards in ranks])


def test_it_is_equal_in_every_layout(monkeypatch):
    monkeypatch.setattr(fingerprints, "_CHUNK", 13)
    whole = random_state(small_model(), 0)
    found = {of(layout, zero, whole) for layout in ((1, 1, 1), (2, 2, 2), (1, 5, 2), (2, 3, 1)) for zero in (0, 1, 3)}
    assert len(found) == 1


def test_it_is_the_sum_over_elements_one_by_one():
    """Against the definition, in Python integers."""
    mask = 2**64 - 1

    def finalise(z):
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    import xxhash

    values = np.random.default_rng(0).standard_normal(12, dtype=np.float32)
    key = xxhash.xxh3_64_intdigest(b"model.p")
    expected = sum(finalise(finalise((i + key) & mask) ^ int(bits)) for i, bits in enumerate(values.view(np.uint32)))
    assert range_sum("model", ParameterSpec("p", (3, 4)), 0, torch.from_numpy(values), 0, 1) == expected & mask


def first(world):
    return next(shard for shard in world.shards[0] if shard.spec.name.endswith("qkv_proj.weight"))


def one_bit(world):
    first(world).weight.view(torch.int32)[3] ^= 1


def swapped(world):
    first(world).weight[:2] = first(world).weight[:2].flip(0)


def moment(world):
    first(world).moments["exp_avg"][0] += 1


def exchanged_moments(world):
    shard = first(world)
    held = shard.moments["exp_avg"].clone()
    shard.moments["exp_avg"].copy_(shard.moments["exp_avg_sq"])
    shard.moments["exp_avg_sq"].copy_(held)


def no_moments(world):
    world.shards = [[dataclasses.replace(shard, moments={}) for shard in shards] for shards in world.shards]


def exchanged_layers(world):
    norms = [shard for shard in world.shards[0] if shard.spec.name.endswith("attention_norm.weight")]
    held = norms[0].weight.clone()
    norms[0].weight.copy_(norms[1].weight)
    norms[1].weight.copy_(held)


@pytest.mark.parametrize("change", [one_bit, swapped, moment, exchanged_moments, no_moments, exchanged_layers])
def test_it_sees_a_change(change):
    whole = random_state(small_model(), 0)
    assert of((1, 2, 1), 3, whole, change) != of((1, 2, 1), 3, whole)


def test_it_does_not_see_padding():
    def pad(world):
        for shards in world.shards:
            for shard in shards:
                if shard.spec.real_rows:
                    shard.weight[max(13 * 6 - shard.start, 0) :] = 9.0

    whole = random_state(small_model(), 0)
    assert of((1, 2, 1), 3, whole, pad) == of((1, 2, 1), 3, whole)


def test_ranks_agree(monkeypatch):
    world = World(layout_of(2, 1, 2), 3, small_model())
    whole = random_state(world.specs, 0)
    world.fill(whole)

    def run(rank):
        return fingerprint(world.shards[rank], world.placements_of(rank), world.groups[rank])

    assert set(ThreadedRanks(monkeypatch).run(4, run)) == {of((1, 1, 1), 0, whole)}
