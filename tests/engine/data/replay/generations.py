"""Reservoirs and generations of all documents of some data sets."""

import numpy as np

from engine.data.replay.generation import Generation
from engine.data.replay.reservoir import Reservoir, Settings
from engine.data.replay.rows import rows_of
from engine.data.shards.dataset import TokenDataset

SPAN = 20


def reservoir_of(*datasets: TokenDataset, capacity: int = 10_000) -> Reservoir:
    """All documents of the data sets, each a domain."""
    reservoir = Reservoir(Settings(capacity, 1, "uniform", span_tokens=SPAN))
    for number, dataset in enumerate(datasets):
        reservoir.add_domain(f"domain {number}", dataset.fingerprint, dataset.index.num_tokens)
        for which, shard in enumerate(dataset.index.shards):
            rows = rows_of(np.arange(shard.num_documents), dataset.offsets(which)[0], SPAN)
            reservoir.admit(f"domain {number}", shard.content_hash, rows)
    return reservoir


def generation_of(*datasets: TokenDataset, capacity: int = 10_000) -> Generation:
    return reservoir_of(*datasets, capacity=capacity).freeze()
