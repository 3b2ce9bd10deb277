"""The order of documents in the output: spread over all shards, so that sources that lie one behind the other mix.

Training reads a window of some shards at a time. If shards held the sources one after the other, a batch would see
only those of its window; so each document has a random key, and shards take the documents by rising key. Keys are the
numbers that splitmix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators") gives from a
seed of the part's own.

Invariant: a key depends on the place of the part among the chunks of the sources, and on the document's place in it:
not on workers, kills, other parts or what is left out. So a part's records are stored by rising key as soon as it is
encoded, and each shard finds its documents of that part in one stretch.
"""

from __future__ import annotations

import numpy as np

from engine.data.order.permutation import mix_array

NAME = "spread over shards, version 1"
"""For the recipe; changes with any change of the order."""

PURPOSE_SPREAD = int.from_bytes(b"spread")
_GAMMA = np.uint64(0x9E3779B97F4A7C15)

ChunkKey = tuple[int, int]
"""Number of the shelf of sources, and of the chunk in it."""


def spread_keys(part: ChunkKey, count: int) -> np.ndarray:
    """Return the keys of a part's documents, (count,) uint64."""
    # splitmix64 is a hash of seed + n * gamma: the n-th number without those before it
    seed = np.random.SeedSequence((PURPOSE_SPREAD, *part)).generate_state(1, np.uint64)
    return mix_array(seed + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


def stored_order(part: ChunkKey, is_validation: np.ndarray) -> np.ndarray:
    """Return a part's documents in the order of its file, (n,) int64: training first, each side by rising key."""
    return np.lexsort((spread_keys(part, is_validation.size), is_validation))
