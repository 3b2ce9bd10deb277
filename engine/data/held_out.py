"""Held-out samples: each once over all ranks, in file order, masked the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch, make_batches
from engine.data.loader import micro_batch_rows
from engine.data.objectives.sampling import Attention, PackingName, Sampler, make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.data.source import Part, Source

EVALUATION_SEED = 0
"""Held-out samples are masked the same in every run, whatever its seed, so that their losses compare."""


class HeldOut:
    """Held-out samples in file order, each once over all ranks; the address of a sample is (0, shard, row)."""

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        attention: Attention,
        max_samples: int | None = None,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
    ) -> None:
        """`max_samples` takes the first so many. Raises `DataError` where the data set holds not one sample, or lacks
        what the objective needs."""

        def sampler(dataset: TokenDataset, seed: int) -> Sampler:
            return make_sampler(dataset, sequence_length, seed, attention, packing, objective)

        self._source = Source(0, Part(dataset), sampler, EVALUATION_SEED, window_shards=1)
        self._source.refuse_empty()
        self._ends = np.cumsum(self._source.count(np.arange(dataset.num_shards)))
        self.num_samples = min(int(self._ends[-1]), max_samples or int(self._ends[-1]))

    def batches(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """This data rank's micro-batches. Every rank gets the same number of them, of the same shape; what is missing
        at the end are rows of weight 0. Raises `DataError` where a shard is damaged."""
        for rows in micro_batch_rows(self.num_samples, data_rank, data_size, micro_batch_size):
            shards = np.searchsorted(self._ends, rows, side="right")
            places = np.stack([shards, rows - np.where(shards > 0, self._ends[shards - 1], 0)], axis=1)
            addresses = np.concatenate([np.zeros((len(rows), 1), np.int64), places], axis=1)
            domains = np.zeros(len(rows), np.int64)
            yield from make_batches([self._source], domains, addresses, places, 1, micro_batch_size)
            self._source.dataset.release()

    def num_batches(self, data_size: int, micro_batch_size: int) -> int:
        """Micro-batches that each data rank gets."""
        return -(-self.num_samples // (micro_batch_size * data_size))
