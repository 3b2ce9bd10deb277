"""Several data sets read as one, so that the rows of a mixture are made in one call and copied once.

Invariant: a row is what its own data set's sampler makes of it: random words are drawn by its source's seed. Shards are
numbered through all data sets. For objectives that ask their data set for shards, their sizes and its tokens' roles
alone; pairs, examples and best-fit packing ask for more, and their sources are read one by one.

B batch (rows), N samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from engine.config.objectives import OBJECTIVES
from engine.config.schema.data import Attention, PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.draws import PURPOSE_OBJECTIVE, words_of_no_sample, write_words
from engine.data.objectives.rows import SampledRows
from engine.data.objectives.sampling import Sampler, SamplerContext, sampler_of
from engine.data.shards.damage import Damage, DamagedShard
from engine.data.shards.dataset import Shard, TokenDataset
from engine.data.tokenizer.vocabulary import Vocabulary


class _JoinedIndex(NamedTuple):
    shards: tuple[Any, ...]
    eos_id: int
    vocabulary: Vocabulary | None


class _JoinedDataset:
    """The attributes of a data set that samplers use, over several data sets."""

    def __init__(self, sets: Sequence[TokenDataset]) -> None:
        self.sets = sets
        shards = tuple(shard for dataset in sets for shard in dataset.index.shards)
        self.index = _JoinedIndex(shards, sets[0].index.eos_id, sets[0].index.vocabulary)
        sizes = [dataset.num_shards for dataset in sets]
        self.firsts = np.cumsum(sizes) - sizes
        self._firsts = self.firsts.tolist()

    def shard(self, number: int) -> Shard:
        """Return a shard. Raises `DamagedShard` with its source."""
        source = bisect_right(self._firsts, number) - 1
        try:
            return self.sets[source].shard(number - self._firsts[source])
        except DamagedShard as error:
            # its rows were counted when its window began, so they keep their addresses
            error.damage = Damage(source, error.number, counted=True)
            raise


@dataclass(frozen=True)
class _JoinedContext(SamplerContext):
    seeds: tuple[int, ...] = field(default=())

    def words(self, samples_B3: np.ndarray, num_rows: int, num_words: int) -> np.ndarray:
        """Return random words of samples whose last column, the fourth, is their source."""
        drawn = words_of_no_sample(num_rows, num_words, len(samples_B3))
        for source, seed in enumerate(self.seeds):
            mine = np.flatnonzero(samples_B3[:, 3] == source)
            write_words(seed, PURPOSE_OBJECTIVE, samples_B3[mine, :3], drawn, mine)
        return drawn[:, :num_words]


class JoinedSampler:
    """The samplers of all sources of a mixture as one."""

    def __init__(
        self,
        sets: Sequence[TokenDataset],
        length: int,
        seeds: Sequence[int],
        attention: Attention,
        objective: ObjectiveConfig,
    ) -> None:
        self._dataset = _JoinedDataset(sets)
        dataset = cast(TokenDataset, self._dataset)
        context = _JoinedContext(dataset, length, 0, attention, "concatenate", objective, tuple(seeds))
        self._sampler: Sampler = sampler_of(context)

    @staticmethod
    def serves(objective: ObjectiveConfig, packing: PackingName) -> bool:
        """Return True for objectives and packings that can be read together."""
        entry = OBJECTIVES[objective.name]
        return packing == "concatenate" and objective.pairs == "none" and not entry.is_task

    def make(
        self, sources_N: np.ndarray, samples_N3: np.ndarray, shard_rows_N2: np.ndarray, num_rows: int
    ) -> SampledRows:
        """Return the rows of samples of the sources `sources_N`, filled up to `num_rows` with padding rows."""
        shard_rows_N2 = shard_rows_N2.copy()
        shard_rows_N2[:, 0] += self._dataset.firsts[sources_N]
        return self._sampler.make(np.concatenate([samples_N3, sources_N[:, None]], axis=1), shard_rows_N2, num_rows)
