"""Reads the batches of a stream for one data rank.

The j-th sample of a global batch belongs to data rank (j // micro_batch_size) % data_size, in its micro-batch
j // (micro_batch_size * data_size). With 2 data ranks and micro-batches of 3, samples 0 to 2 of a batch of 12 are rank
0's first micro-batch, 3 to 5 rank 1's first, 6 to 8 rank 0's second. Which samples these are is the stream's business
(`engine.data.stream`); reading changes only when. Some steps are read together, which costs hardly more than one.
`engine.data.prefetch` reads in a thread. Steps that are read and not trained on yet wait in one place: the loader's or
the prefetcher's.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import NamedTuple

import numpy as np

from engine.config.schema.data import PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch, make_batches, reuse_freed_memory
from engine.data.mixed_order import MixedOrder, Samples
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Progress, Step, Stream
from engine.errors import DataError

MOST_STEPS = 8
"""Steps that are read together."""
MOST_TOKENS = 1 << 17
"""Tokens of a rank that are made into batches together, and from which on no further step is read with others: enough
that the calls of numpy hardly count, little enough to stay in a cache."""
WINDOW_SHARDS = 16
"""The default of `DataConfig.window_shards`."""

Ranks = tuple[int, int, int]
"""Data rank, data ranks, and rows of a micro-batch."""


class ReadStep(NamedTuple):
    """A step that was read, and how far the stream has come before and after it."""

    before: Progress
    batches: list[Batch]
    after: Progress


class StepReader:
    """Reads the next steps of a stream, some together; keeps none of them.

    Who keeps them decides when the next ones are read: `Loader` when it has none left, `engine.data.prefetch` as soon
    as few are waiting.
    """

    def __init__(self) -> None:
        self._steps_together = 1
        reuse_freed_memory()  # before the first batch, for all batches of the process

    def read(self, stream: Stream, ranks: Ranks) -> list[ReadStep]:
        """Return one or more steps from the next on: twice as many as the last time while all goes well.

        The stream stays where it is.

        Raises:
            DataError: a shard of the next step is damaged. What is wrong with a later step is raised when it is due.
        """
        try:
            # 1, 2, 4, 8: the first step of a run does not wait until seven more are read
            found = _read(stream, ranks, self._steps_together)
            self._steps_together = min(2 * self._steps_together, MOST_STEPS)
        except DataError:
            # the fault may lie in a later step: read the next one alone, and meet the fault when its step is due
            if self._steps_together == 1:
                raise
            self._steps_together = 1
            found = _read(stream, ranks, 1)
        return found


class Loader:
    """The micro-batches of a stream, step after step. The stream may be moved and changed between the steps."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._reader = StepReader()
        self._waiting: deque[ReadStep] = deque()
        self._read_for: tuple[MixedOrder, Ranks] | None = None

    def step(self, data_rank: int, data_size: int, micro_batch_size: int) -> list[Batch]:
        """Return this data rank's micro-batches of the next global batch; the stream advances behind it.

        Every rank gets the same number of them, of the same shape; what is missing at the end are padding rows.

        Raises:
            DataError: a shard is damaged; the stream has not advanced then.
        """
        wanted = (self.stream.order, (data_rank, data_size, micro_batch_size))
        is_next = self._waiting and self._waiting[0].before == self.stream.progress
        # steps read together are valid for one order, one position and one set of ranks; a rollback changes the first
        # two
        if not is_next or self._read_for != wanted:
            self._waiting, self._read_for = deque(self._reader.read(self.stream, wanted[1])), wanted
        step = self._waiting.popleft()
        self.stream.advance_to(step.after)
        return step.batches


def _read(stream: Stream, ranks: Ranks, most_steps: int) -> list[ReadStep]:
    """Read up to `most_steps` steps from the next on."""
    order, row_tokens = stream.order, stream.sequence_length
    _, data_size, micro_batch_size = ranks
    stride = data_size * micro_batch_size
    steps = _next_steps(stream, most_steps, stride, max(1, MOST_TOKENS * data_size // row_tokens))
    samples = Samples.joined([step.samples for step in steps])
    rows, together = micro_batch_rows(samples.size, *ranks), max(1, MOST_TOKENS // (micro_batch_size * row_tokens))
    batches: list[Batch] = []
    # rows are made for some micro-batches at a time: a step of a million tokens would leave the cache between passes
    for group in (rows[first : first + together] for first in range(0, len(rows), together)):
        mine = samples.at(np.concatenate(group))
        shard_rows_N2 = order.shard_rows(mine)
        batches += make_batches(order.sources, *mine, shard_rows_N2, len(group), micro_batch_size, order.joined)
    for source in order.sources:
        # batches are copies: from here on the cache may evict these shards
        source.dataset.release()
    # batches of all steps in one list: each step takes its own number of them off the front
    left = iter(batches)
    return [ReadStep(step.before, list(islice(left, -(-step.samples.size // stride))), step.after) for step in steps]


def _next_steps(stream: Stream, most_steps: int, stride: int, enough: int) -> list[Step]:
    """Return the next steps, until they have `enough` samples.

    No step follows one that leaves a window, so that no more shards are in use than without reading together, nor
    one whose last micro-batch is not full, which is one that `stride` does not divide.
    """
    found: list[Step] = []
    count = 0
    for step in islice(stream.coming_steps(), most_steps):
        found.append(step)
        count += step.samples.size
        left_window = step.after.cursor.windows != stream.progress.cursor.windows
        if left_window or count >= enough or count % stride:
            break
    return found


def micro_batch_rows(num_samples: int, data_rank: int, data_size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Return the numbers of the samples in each micro-batch of a data rank; the last ones may be short or empty."""
    stride = micro_batch_size * data_size
    # 10 samples, 2 data ranks, micro-batches of 3: stride 6; rank 0 gets 0 to 2 and 6 to 8, rank 1 gets 3 to 5 and 9
    firsts = range(data_rank * micro_batch_size, -(-num_samples // stride) * stride, stride)
    return [np.arange(first, max(first, min(first + micro_batch_size, num_samples))) for first in firsts]


def first_samples(
    dataset: TokenDataset,
    sequence_length: int,
    seed: int,
    count: int,
    packing: PackingName = "concatenate",
    objective: ObjectiveConfig | None = None,
) -> Batch:
    """Return the first `count` samples (1 or more) of epoch 0, or all where it has fewer, as training makes them.

    Raises:
        DataError: the data set holds no sample, or lacks what the objective needs.
    """
    shape = (WINDOW_SHARDS, "document", packing, objective)
    count = min(count, Stream(dataset, sequence_length, 1, seed, *shape).samples_per_epoch())
    return Loader(Stream(dataset, sequence_length, count, seed, *shape)).step(0, 1, count)[0]
