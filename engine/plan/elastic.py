"""Worlds in which a run can go on when ranks are lost or won: the global batch stays, the layout changes.

For each world the data axis takes what pipe and tensor leave, and the micro-batch is the largest up to the configured
one with which micro-batch x accumulation x data makes the global batch: a smaller one takes less memory, never more.
Where `elastic.pad_batch` allows it, the batch is filled up with rows of weight 0. Whether a world is valid is asked of
`engine.config.resolve`, not retold.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from engine.config.resolve import Layout, examine
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.plan.worlds import with_parallel


@dataclass(frozen=True)
class World:
    """One world, and the layout of a run in it."""

    parallel: ParallelConfig
    layout: Layout
    padded_rows: int
    """Rows of weight 0 in a step of a run stage's largest batch; of several run stages, the most."""

    @property
    def size(self) -> int:
        return self.layout.world_size

    def overrides(self, config: RunConfig) -> list[str]:
        """Return the overrides with which `config` starts here."""
        before, now = config.parallel.model_dump(), self.parallel.model_dump()
        return [f"parallel.{key}={_as_typed(value)}" for key, value in now.items() if value != before[key]]


def _as_typed(value: Any) -> str:
    """Return a value of the configuration as YAML 1.2, where None is a word like any other and null is nothing."""
    return value if isinstance(value, str) else json.dumps(value)


def elastic_worlds(config: RunConfig, largest: int) -> list[World]:
    """Return every world of at most `largest` ranks in which the run can go on with another data axis, ascending."""
    fixed = config.parallel.pipe * config.parallel.tensor * config.parallel.sequence
    worlds = [_by_data(config, data) for data in range(1, largest // fixed + 1)]
    return [world for world in worlds if world is not None]


def _by_data(config: RunConfig, data: int) -> World | None:
    fixed = config.parallel.pipe * config.parallel.tensor * config.parallel.sequence
    for micro_batch_size in _micro_batch_sizes(config, data):
        tried = with_parallel(config, data=data, micro_batch_size=micro_batch_size)
        layout, problems = examine(tried, fixed * data)
        # Sizes come best first, so the first valid one decides.
        if layout is not None and not problems:
            return describe(tried, layout)
    return None


def _micro_batch_sizes(config: RunConfig, data: int) -> list[int]:
    """Return the sizes to try for `data` ranks: those that need the fewest rows first, of these the largest first."""
    sizes = [size for stage in config.stages for size in stage.batches.sizes]
    tried = range(config.parallel.micro_batch_size, 0, -1)
    if config.elastic.pad_batch:
        # `sorted` is stable and `tried` descends: among equal numbers of rows the largest micro-batch comes first.
        return sorted(tried, key=lambda micro_batch_size: sum(_rows(size, micro_batch_size, data) for size in sizes))
    return [micro_batch_size for micro_batch_size in tried if math.gcd(*sizes) % (micro_batch_size * data) == 0]


def describe(config: RunConfig, layout: Layout) -> World:
    """Return the world of a layout that is valid for the configuration."""
    sizes = [run_stage.batches.largest for run_stage in config.stages]
    padded = [_rows(size, config.parallel.micro_batch_size, layout.data) - size for size in sizes]
    return World(config.parallel, layout, max(padded))


def _rows(size: int, micro_batch_size: int, data: int) -> int:
    """Number of rows that a batch of `size` samples is padded to: 10 samples in micro-batches of 2 on 3 ranks, 12."""
    return -(-size // (micro_batch_size * data)) * micro_batch_size * data
