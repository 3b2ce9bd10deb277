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

from engine.config.schema.data import PackingName
from engine.config.schema.objective import ObjectiveConfig
from engine.data.batch import Batch, make_batches, reuse_freed_memory
from engine.data.mixed_order import MixedOrder
from engine.data.shards.dataset import TokenDataset
from engine.data.step_groups import Ranks, StepGroup, StepGroups
from engine.data.stream import Stream
from engine.data.stream_state import Progress
from engine.errors import DataError

MOST_STEPS = 8
"""Steps that are read together."""
MOST_TOKENS = 1 << 17
"""Tokens of a rank that are made into batches together, and from which on no further step is read with others: enough
that the calls of numpy hardly count, little enough to stay in a cache."""
WINDOW_SHARDS = 16
"""The default of `DataConfig.window_shards`."""


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
        self._groups = StepGroups()
        reuse_freed_memory()  # before the first batch, for all batches of the process

    def read(self, stream: Stream, ranks: Ranks) -> list[ReadStep]:
        """Return one or more steps from the next on: twice as many as the last time while all goes well.

        The stream stays where it is.

        Raises:
            DataError: a shard of the next step is damaged. What is wrong with a later step is raised when it is due.
        """
        try:
            # 1, 2, 4, 8: the first step of a run does not wait until seven more are read
            found = self._read(stream, ranks)
            self._steps_together = min(2 * self._steps_together, MOST_STEPS)
        except DataError:
            # the fault may lie in a later step: read the next one alone, and meet the fault when its step is due
            if self._steps_together == 1:
                raise
            self._steps_together = 1
            found = self._read(stream, ranks)
        return found

    def _read(self, stream: Stream, ranks: Ranks) -> list[ReadStep]:
        enough = max(1, MOST_TOKENS * ranks[1] // stream.sequence_length)  # samples of all ranks
        most_steps = min(self._steps_together, -(-enough // stream.batch_size))
        ahead = self._steps_together == MOST_STEPS
        return _read(stream, self._groups.next(stream, ranks, most_steps, ahead), ranks[2])


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


def _read(stream: Stream, group: StepGroup, micro_batch_size: int) -> list[ReadStep]:
    """Read the steps of a group."""
    order, together = stream.order, max(1, MOST_TOKENS // (micro_batch_size * stream.sequence_length))
    batches: list[Batch] = []
    # rows are made for some micro-batches at a time: a step of a million tokens would leave the cache between passes
    for first in range(0, sum(group.num_batches), together):
        num_batches = min(together, sum(group.num_batches) - first)
        rows = slice(first * micro_batch_size, (first + num_batches) * micro_batch_size)
        mine, shard_rows_N2 = group.mine.at(rows), group.shard_rows_N2[rows]
        batches += make_batches(order.sources, *mine, shard_rows_N2, num_batches, micro_batch_size, order.joined)
    for source in order.sources:
        # batches are copies: from here on the cache may evict these shards
        source.dataset.release()
    # batches of all steps in one list: each step takes its own number of them off the front
    left = iter(batches)
    found = []
    for step, count in zip(group.steps, group.num_batches, strict=True):
        length = stream.row_length(step.samples)
        found.append(ReadStep(step.before, [batch.cut(length) for batch in islice(left, count)], step.after))
    return found


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
