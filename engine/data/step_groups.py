"""The next steps of a stream for one data rank, drawn many at a time and handed out in groups that are read together.

Drawing a step costs some tens of calls of numpy however few samples it has, so steps are drawn ahead of what is read:
which samples they are, and the shards and rows of those that this rank reads. Invariant: a drawn step is that which the
stream would draw alone, and is dropped where the stream has moved or its order has changed since. Reads no token.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from engine.data.mixed_order import MixedOrder, Samples
from engine.data.stream import Step, Stream

MOST_SAMPLES = 1 << 13
"""Samples that are drawn ahead, at most, where that is more than one group."""

Ranks = tuple[int, int, int]
"""Data rank, data ranks, and rows of a micro-batch."""


class StepGroup(NamedTuple):
    """Steps that are read together."""

    steps: list[Step]
    num_batches: list[int]
    """Micro-batches of each step; those of all steps but the last are full."""
    mine: Samples
    """Samples of this rank, micro-batch after micro-batch."""
    shard_rows_N2: np.ndarray
    """Shard and row of each, int64."""


class StepGroups:
    """The groups of a stream's next steps."""

    def __init__(self) -> None:
        self._groups: deque[StepGroup] = deque()
        self._drawn_for: tuple[MixedOrder, Ranks] | None = None

    def next(self, stream: Stream, ranks: Ranks, most_steps: int, ahead: bool) -> StepGroup:
        """Return the next group, of up to `most_steps`; with `ahead`, those after it are drawn with it.

        The stream stays where it is. No step of a group follows one that leaves a window, so that no more shards are in
        use than without reading together, nor one whose last micro-batch is not full.

        Raises:
            DataError: the data ends with the step before, or offsets of a shard are damaged.
        """
        is_next = bool(self._groups) and self._groups[0].steps[0].before == stream.progress
        if not is_next or self._drawn_for != (stream.order, ranks) or len(self._groups[0].steps) > most_steps:
            most_drawn = max(most_steps, MOST_SAMPLES // stream.batch_size) if ahead else most_steps
            self._groups = deque(_groups(stream.order, stream.draw(most_drawn), ranks, most_steps))
            self._drawn_for = (stream.order, ranks)
        return self._groups.popleft()


def _groups(order: MixedOrder, steps: list[Step], ranks: Ranks, most_steps: int) -> list[StepGroup]:
    stride = ranks[1] * ranks[2]
    # a step whose last micro-batch is short ends what can be cut into micro-batches as a whole
    uneven = next((number for number, step in enumerate(steps) if step.samples.size % stride), len(steps) - 1)
    steps = steps[: uneven + 1]
    samples = Samples.joined([step.samples for step in steps])
    mine = samples.at(rank_rows(samples.size, *ranks))
    shard_rows_N2 = order.shard_rows(mine)
    found, row = [], 0
    for first in range(0, len(steps), most_steps):
        group = steps[first : first + most_steps]
        num_batches = [-(-step.samples.size // stride) for step in group]
        end = row + sum(num_batches) * ranks[2]  # beyond the rows where the last micro-batch is short
        found.append(StepGroup(group, num_batches, mine.at(slice(row, end)), shard_rows_N2[row:end]))
        row = end
    return found


def rank_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> np.ndarray:
    """Return the numbers of the samples of a data rank, micro-batch after micro-batch, (n,) int64.

    With 10 samples, 2 data ranks and micro-batches of 3, rank 0 gets 0 to 2 and 6 to 8, rank 1 gets 3 to 5 and 9.
    """
    numbers = np.arange(num_samples)
    return numbers if data_size == 1 else numbers[numbers // micro_batch_size % data_size == data_rank]


def micro_batch_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Return the numbers of the samples in each micro-batch of a data rank; the last ones may be short or empty."""
    rows = rank_rows(num_samples, data_rank, data_size, micro_batch_size)
    num_batches = -(-num_samples // (data_size * micro_batch_size))
    return [rows[number * micro_batch_size : (number + 1) * micro_batch_size] for number in range(num_batches)]
