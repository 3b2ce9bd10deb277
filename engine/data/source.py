"""A data set as one of the sources of a stream: its sampler, the order of its samples, and the shards it goes without.

Invariant: what a source gives, in which order, and with which random words, depends on (data set, run's seed, its
name, shards lost) alone: other sources and the weights move nothing inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.data.objectives.sampling import Sampler
from engine.data.order.stream import SampleId, SampleOrder
from engine.data.shards.damage import Damage, DamagedShard
from engine.data.shards.dataset import TokenDataset
from engine.errors import DataError

PURPOSE_SOURCE = int.from_bytes(b"source")

MakeSampler = Callable[[TokenDataset, int], Sampler]
"""(data set, seed) -> sampler."""


@dataclass(frozen=True)
class Part:
    """A data set and its share of the stream."""

    dataset: TokenDataset
    name: str = ""
    """Empty where it is the only one."""
    weight: int = 1
    epochs: float | None = None
    """It ends after so many passes; None: never."""
    max_samples: int | None = None
    """It ends after so many samples; None: never."""


class Source:
    """One part of a stream, ready to be read."""

    def __init__(
        self,
        number: int,
        part: Part,
        make_sampler: MakeSampler,
        seed: int,
        window_shards: int,
        lost: tuple[Damage, ...] = (),
    ) -> None:
        """`lost` are damages of this source. Raises `DataError` where the data set lacks what the sampler needs."""
        self.number, self.part, self.dataset = number, part, part.dataset
        self._arguments = (make_sampler, seed, window_shards)
        own = _own_seed(seed, part.name)
        self.sampler = make_sampler(part.dataset, own)
        self.lost = np.array(sorted(damage.shard for damage in lost), np.int64)
        self._uncounted = np.array([damage.shard for damage in lost if not damage.counted], np.int64)
        self.order = SampleOrder(part.dataset.num_shards, self.count, own, window_shards)

    def again(self, lost: tuple[Damage, ...]) -> Source:
        """The same without those shards, sharing nothing but the opened data set."""
        mine = tuple(damage for damage in lost if damage.source == self.number)
        return Source(self.number, self.part, *self._arguments, mine)

    def count(self, shards: np.ndarray) -> np.ndarray:
        """(n,) int64 rows of shards (n,). Raises `DamagedShard` where they cannot be counted."""
        counts = np.zeros(shards.size, np.int64)
        counted = ~np.isin(shards, self._uncounted)
        try:
            counts[counted] = self.sampler.count(shards[counted])
        except DamagedShard as error:
            error.damage = Damage(self.number, error.number, counted=False)
            raise
        return counts

    def limit(self) -> int | None:
        """Samples that it gives at most. With `epochs`, counts the rows of all shards."""
        limits = [self.part.max_samples]
        if self.part.epochs is not None:
            limits.append(int(self.part.epochs * self.count(np.arange(self.dataset.num_shards)).sum()))
        return min((limit for limit in limits if limit is not None), default=None)

    def refuse_lost(self, places_N2: np.ndarray) -> np.ndarray:
        """(N,) bool: the places that are not in a lost shard."""
        return ~np.isin(places_N2[:, 0], self.lost)

    def refuse_mid_window(self, damage: Damage, here: SampleId) -> None:
        """Raises `DataError` where a window has begun whose rows can no longer be counted."""
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
        """Raises `DataError` where no shard is left that has a sample; looks no further than the first that has one."""
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
            "prepare more text (or a larger --validation-fraction, where this is the held-out part)",
        )


def _own_seed(seed: int, name: str) -> int:
    """The seed of a source: the run's where there is but one, else one that its name takes part in."""
    if not name:
        return seed
    words = np.random.SeedSequence((seed, PURPOSE_SOURCE, int.from_bytes(name.encode()))).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])
