"""Made-up shards of three domains, and what several ranks admit of them."""

import hashlib

import numpy as np

from engine.data.replay.reservoir import Reservoir, Settings
from engine.data.replay.rows import Rows, rows_of
from engine.data.shards.tombstones import NO_TOMBSTONES


def name_of(number):
    return hashlib.sha256(f"shard {number}".encode()).hexdigest()[:32]


SIZES = {"books": 6000, "code": 3000, "web": 1000}
SHARDS = {"books": range(6), "code": range(6, 9), "web": range(9, 10)}
ROWS = 400


def all_rows(documents=ROWS):
    return rows_of(np.arange(documents), np.arange(0, 5 * documents + 5, 5), 2048)


def part_of(rows, which):
    return Rows(rows.inside[which], rows.lengths[which])


def new(capacity=500, quota="proportional", seed=3, tombstones=NO_TOMBSTONES, **settings):
    reservoir = Reservoir(Settings(capacity, seed, quota, **settings), tombstones)
    for domain, size in SIZES.items():
        reservoir.add_domain(domain, "fingerprint", size)
    return reservoir


def content(reservoir):
    reservoir.settle()
    generation = reservoir.freeze()
    triples = [
        (
            name,
            found.keys.tobytes(),
            [(reservoir.shards[row_id >> 44], row_id % 2**44) for row_id in found.row_ids.tolist()],
        )
        for name, found in sorted(reservoir.entries.items())
    ]
    return triples, generation.hash


def admissions(generator, weighted=False):
    """Every row of every shard, in pieces of random size and order, some of them twice."""
    rows, pieces = all_rows(), []
    for domain, shards in SHARDS.items():
        for number in shards:
            order = generator.permutation(rows.inside.size)
            for which in np.array_split(order, generator.integers(1, 6)):
                pieces += [(domain, number, which)] * int(generator.integers(1, 3))
    generator.shuffle(pieces)
    weights = 0.5 + np.random.default_rng(5).random(ROWS) if weighted else None
    return [
        (domain, name_of(number), part_of(rows, which), None if weights is None else weights[which])
        for domain, number, which in pieces
    ]
