"""The first samples of a run, to be looked at: no batches and no torch."""

from __future__ import annotations

from collections.abc import Iterator

from engine.data.dataset import TokenDataset
from engine.data.packing import Row, pack, rows_per_shard
from engine.data.stream import SampleOrder

WINDOW_SHARDS = 16
"""The default of `DataConfig.window_shards`."""


def first_samples(
    dataset: TokenDataset, sequence_length: int, seed: int, count: int, window_shards: int = WINDOW_SHARDS
) -> Iterator[tuple[str, Row]]:
    """Each of the first `count` samples of epoch 0: where it lies, as text, and its row. Raises `DataError`."""
    order = SampleOrder(rows_per_shard(dataset, sequence_length), seed, window_shards)
    for number, row in order.places(0, min(count, order.samples_per_epoch)).tolist():
        shard = dataset.shard(number)
        yield f"{shard.name}:{row}", pack(shard, row, sequence_length)
