"""A data set as one of the sources of a stream: its sampler, the order of its samples, and the shards it goes without.

Invariant: what a source gives, in which order, and with which random words, depends on (data set, run's seed, its
name, shards lost) alone: other sources and the weights move nothing inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.sampling import Sampler
from engine.data.order.sample_order import CountRows, Order, SampleId
from engine.data.shards.damage import Damage, DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError

PURPOSE_SOURCE = int.from_bytes(b"source")


@dataclass(frozen=True)
class WeightedDataset:
    """A data set and its share of the stream."""

    dataset: TokenDataset
    name: str = ""
    """Empty where it is the only one."""
    weight: int = 1
    loss_weight: float = 1.0
    """Weight of its targets in the loss."""
    epochs: float | None = None
    """It ends after so many passes; None: never."""
    max_samples: int | None = None
    """It ends after so many samples; None: never."""
    is_replay: bool = False
    """True for earlier data that is replayed, from a folder or from the reservoir."""
    objective: ObjectiveConfig | None = None
    """Objective of its samples; None: that of the run stage."""

    @property
    def label(self) -> str:
        """Name in metrics. The one data set of `data.train` has none; where others are mixed in, it is `new`."""
        return self.name or "new"


class Source:
    """One part of a stream with the order of its samples, ready to be read."""

    def __init__(
        self,
        number: int,
        part: WeightedDataset,
        sampler: Sampler,
        order: Callable[[CountRows], Order],
        lost: tuple[Damage, ...] = (),
    ) -> None:
        """Open a source; `order` is given a function that counts rows. `lost` may hold damages of other sources."""
        mine = [damage for damage in lost if damage.source == number]
        self.number, self.part, self.dataset, self.sampler = number, part, part.dataset, sampler
        self.loss_weight = part.loss_weight
        self.lost = np.array(sorted(damage.shard for damage in mine), np.int64)
        self._uncounted = np.array([damage.shard for damage in mine if not damage.counted], np.int64)
        # last: the order counts rows through this source, which leaves out what is lost
        self.order = order(self.count)

    def count(self, shards: np.ndarray) -> np.ndarray:
        """Return the rows of shards (n,), (n,) int64. Raises `DamagedShard` where they cannot be counted."""
        counts = np.zeros(shards.size, np.int64)
        counted = ~np.isin(shards, self._uncounted)
        try:
            counts[counted] = self.sampler.count(shards[counted])
        except DamagedShard as error:
            error.damage = Damage(self.number, error.number, counted=False)
            raise
        return counts

    def limit(self) -> int | None:
        """Return the samples that it gives at most. With `epochs`, counts the rows of all shards."""
        limits = [self.part.max_samples]
        if self.part.epochs is not None:
            # 1.5 epochs are all samples of the first epoch and the first half of those of the second
            limits.append(int(self.part.epochs * self.count(np.arange(self.dataset.num_shards)).sum()))
        return min((limit for limit in limits if limit is not None), default=None)

    def is_kept(self, shard_rows_N2: np.ndarray) -> np.ndarray:
        """Return True for each (shard, row) whose shard is not lost, (N,) bool."""
        return ~np.isin(shard_rows_N2[:, 0], self.lost)

    def refuse_mid_window(self, damage: Damage, here: SampleId) -> None:
        """Raise `DataError` where a window has begun whose rows can no longer be counted."""
        begun = here.slot > 0 and damage.shard in self.order.shards(here.epoch, here.window)
        if begun and not damage.counted:
            name = self.dataset.index.shards[damage.shard].documents.file
            raise DataError(
                f"{name} in {self.dataset.location} is damaged, and samples of its window are trained on already: how "
                "many are left cannot be known",
                "offsets as they were when the window began",
                "restore the file from a copy, and resume",
            )

    def refuse_empty(self) -> None:
        """Raise `DataError` where no shard is left that has a sample; looks no further than the first that has one."""
        for number in np.setdiff1d(np.arange(self.dataset.num_shards), self.lost).tolist():
            try:
                if int(self.count(np.array([number]))[0]):
                    return
            except DamagedShard:
                continue  # it says so when it is its turn
        index = self.dataset.index
        raise DataError(
            f"the data set {self.dataset.location} holds no sample: {index.num_documents} documents, "
            f"{index.num_tokens} tokens" + (f", {self.lost.size} damaged shards" if self.lost.size else ""),
            "at least one document",
            "prepare more text (or a larger --validation-fraction, where this is validation data)",
        )


def source_seed(seed: int, name: str) -> int:
    """Return the seed of a source: the run's where there is but one, else one that depends on its name, too."""
    if not name:
        return seed
    words = np.random.SeedSequence((seed, PURPOSE_SOURCE, int.from_bytes(name.encode()))).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])
