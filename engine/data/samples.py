"""The first samples of a run, to be looked at: one micro-batch, made as training makes it."""

from __future__ import annotations

from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch
from engine.data.loader import Loader
from engine.data.objectives.sampling import PackingName
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Stream

WINDOW_SHARDS = 16
"""The default of `DataConfig.window_shards`."""


def first_samples(
    dataset: TokenDataset,
    sequence_length: int,
    seed: int,
    count: int,
    packing: PackingName = "concatenate",
    objective: ObjectiveConfig | None = None,
) -> Batch:
    """The first `count` samples (1 or more) of epoch 0, or all where it has fewer. Raises `DataError`."""
    shape = (WINDOW_SHARDS, "document", packing, objective)
    count = min(count, Stream(dataset, sequence_length, 1, seed, *shape).samples_per_epoch())
    return Loader(Stream(dataset, sequence_length, count, seed, *shape)).step(0, 1, count)[0]
