"""Validation samples of one or more data sets: each once over all ranks, in file order, with equal masks in every run.

A data set's samples and masks do not depend on the others, so its loss is the one that it has alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from engine.config.schema.data import Attention, PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch, make_batches
from engine.data.objectives.replayed import replayed_sampler
from engine.data.objectives.sampling import Sampler, make_sampler
from engine.data.order.sample_order import SampleOrder
from engine.data.row_lengths import example_lengths, fitting
from engine.data.shards.dataset import TokenDataset
from engine.data.source import Source, WeightedDataset
from engine.data.step_groups import micro_batch_rows

EVALUATION_SEED = 0
"""Held-out samples are masked the same in every run, whatever its seed, so that their losses compare."""


ValidationSet = tuple[str, TokenDataset]
"""A name, which is empty where there is but one data set and it has none; and the data set."""


class ValidationSamples:
    """Held-out samples in the order of the data sets and of their files, each once over all ranks; the address of a
    sample in its data set is (0, shard, row)."""

    def __init__(
        self,
        sets: TokenDataset | Sequence[ValidationSet],
        sequence_length: int,
        attention: Attention,
        max_samples: int | None = None,
        packing: PackingName = "concatenate",
        objective: ObjectiveConfig | None = None,
        row_lengths: tuple[int, ...] = (),
        beside: ObjectiveConfig | None = None,
    ) -> None:
        """Open the data sets; `max_samples` limits each to its first samples. With `row_lengths`, as those of a stream,
        samples come in the order of their lengths. `beside` is the task that the objective is trained beside, if any.
        Raises `DataError` if one holds no sample, or lacks what the objective needs."""

        def sampler_of(dataset: TokenDataset) -> Sampler:
            given = dataset, sequence_length, EVALUATION_SEED, attention
            if beside is None or objective is None:
                return make_sampler(*given, packing, objective)
            return replayed_sampler(*given, objective, beside)

        def source(number: int, dataset: TokenDataset) -> Source:
            sampler = sampler_of(dataset)
            order = partial(SampleOrder, dataset.num_shards, seed=EVALUATION_SEED, window_shards=1)
            return Source(number, WeightedDataset(dataset), sampler, order)

        named = [("", sets)] if isinstance(sets, TokenDataset) else list(sets)
        self.names = tuple(name for name, _ in named if name)
        """Names of the data sets; empty if the only one has none."""
        self._sources = [source(number, dataset) for number, (_, dataset) in enumerate(named)]
        for opened in self._sources:
            opened.refuse_empty()
        self._ends = [np.cumsum(opened.count(np.arange(opened.dataset.num_shards))) for opened in self._sources]
        sizes = [min(int(ends[-1]), max_samples or int(ends[-1])) for ends in self._ends]
        self._starts = np.array([0, *itertools.accumulate(sizes)])
        self.num_samples = sum(sizes)
        self._row_lengths, self._sequence_length = row_lengths, sequence_length
        # (samples,) lengths, and the numbers of the samples in the order in which they are read
        self._lengths = self._example_lengths() if row_lengths else None
        self._order = None if self._lengths is None else np.argsort(self._lengths, kind="stable")
        self.is_measured = not self.names and self.num_samples == sum(int(ends[-1]) for ends in self._ends)
        """True for one data set without a name of which `max_samples` leaves nothing out: a task's predictions on it
        have measures."""

    @property
    def datasets(self) -> list[TokenDataset]:
        """The data sets in their order."""
        return [source.dataset for source in self._sources]

    def batches(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """Yield this data rank's micro-batches, whose `domains_B` are numbers of data sets.

        Every rank gets the same number of them, of the same shape; what is missing at the end are padding rows. Raises
        `DataError` where a shard is damaged.
        """
        for rows in self.numbers(data_rank, data_size, micro_batch_size):
            domains, shard_rows = self._located(rows)
            addresses = np.concatenate([np.zeros((len(rows), 1), np.int64), shard_rows], axis=1)
            yield from make_batches(self._sources, domains, addresses, shard_rows, 1, micro_batch_size)
            for source in self._sources:
                source.dataset.release()

    def numbers(self, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
        """Return the numbers of the samples in each of this data rank's micro-batches; the last ones may be short."""
        batches = micro_batch_rows(self.num_samples, data_rank, data_size, micro_batch_size)
        return batches if self._order is None else [self._order[places] for places in batches]

    def row_length(self, first: int, end: int) -> int:
        """Return the tokens of the rows for the samples that are read first, ..., end - 1 over all ranks."""
        if self._lengths is None or self._order is None:
            return self._sequence_length
        longest = int(self._lengths[self._order[first:end]].max(initial=0))
        return fitting(longest, self._row_lengths, self._sequence_length)

    def num_batches(self, data_size: int, micro_batch_size: int) -> int:
        """Return the number of micro-batches that each data rank gets."""
        return -(-self.num_samples // (micro_batch_size * data_size))

    def _located(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return data set, (n,), and shard and row, (n, 2), of samples by their numbers."""
        # data sets of 5 and 3 samples: starts (0, 5, 8); sample 5 is the first of the second, number 1
        domains = np.searchsorted(self._starts, numbers, side="right") - 1
        shard_rows = np.empty((len(numbers), 2), np.int64)
        for k in np.unique(domains).tolist():
            shard_rows[domains == k] = self._shard_rows(k, numbers[domains == k] - self._starts[k])
        return domains, shard_rows

    def _example_lengths(self) -> np.ndarray:
        domains, shard_rows = self._located(np.arange(self.num_samples))
        lengths = np.empty(self.num_samples, np.int64)
        for k, dataset in enumerate(self.datasets):
            lengths[domains == k] = example_lengths(dataset, shard_rows[domains == k])
        return lengths

    def _shard_rows(self, k: int, rows: np.ndarray) -> np.ndarray:
        """Return shard and row of the samples of a data set by their numbers in it, (rows, 2)."""
        ends = self._ends[k]
        shards = np.searchsorted(ends, rows, side="right")
        return np.stack([shards, rows - np.where(shards > 0, ends[shards - 1], 0)], axis=1)
