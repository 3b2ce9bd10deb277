"""An order of samples in which those of a step are of similar length: a pure function of the position.

The samples of a window come shuffled, as in `engine.data.order.sample_order`. Some steps' worth of them at a time (a
pool) are sorted by length and cut into steps, and the steps of a pool are shuffled. Samples of equal length stay as
shuffled. Callers round lengths up to those that rows have: a step is then a draw from all samples of its pool that fit
its rows, and texts that hardly differ do not always meet. Pools and steps are counted from the beginning of the run, so
that a step holds one cut also where a window or an epoch ends inside of it. Invariant: an epoch visits each row once,
in an order that depends on (seed, epoch, rows per shard, window_shards, lengths of rows, samples per step) alone.

N slots of a pool, C cuts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from engine.data.order.permutation import Permutation
from engine.data.order.sample_order import CountRows, SampleOrder

VERSION = 2
"""Changes with any change of this order, beside that of `sample_order`."""
POOL_STEPS = 64
"""Steps whose samples are sorted together."""
PURPOSE_CUTS = int.from_bytes(b"cuts")
_POOLS_KEPT = 8

RowLengthsOf = Callable[[np.ndarray], np.ndarray]
"""(n, 2) shards and rows -> (n,) int64 lengths."""


class LengthOrder(SampleOrder):
    """Order of the samples of a data set by pools of similar length."""

    def __init__(
        self,
        num_shards: int,
        count_rows: CountRows,
        seed: int,
        window_shards: int,
        lengths_of: RowLengthsOf,
        step_samples: int,
    ) -> None:
        """Make the order; `step_samples` is the number of samples that are cut off together."""
        super().__init__(num_shards, count_rows, seed, window_shards)
        self._lengths_of, self._step = lengths_of, step_samples
        self._pools: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._rows = count_rows(np.arange(num_shards))

    def _shard_rows_in_window(self, epoch: int, window: int, slots: np.ndarray) -> np.ndarray:
        """Return shard and row of rising slots (n,) of a window, (n, 2) int64."""
        if not slots.size:
            return np.empty((0, 2), np.int64)
        start, size = self._start(epoch, window), POOL_STEPS * self._step
        first, last = (start + int(slots[0])) // size, (start + int(slots[-1])) // size
        parts = [self._pool(epoch, window, number) for number in range(first, last + 1)]
        # pools of 8 positions, a window from position 5 on: its pool 0 begins at slot 0, and pool 1 at slot 3
        begin = max(first * size, start) - start
        return np.concatenate(parts)[slots - begin]

    def _pool(self, epoch: int, window: int, number: int) -> np.ndarray:
        """Return shard and row of the slots of a window in a pool, (N, 2) int64: computed once, then cached."""
        found = self._pools.get((epoch, window, number))
        if found is None:
            found = self._pools[epoch, window, number] = self._make_pool(epoch, window, number)
            if len(self._pools) > _POOLS_KEPT:
                self._pools.popitem(last=False)
        return found

    def _make_pool(self, epoch: int, window: int, number: int) -> np.ndarray:
        start, size = self._start(epoch, window), POOL_STEPS * self._step
        begin, end = max(number * size, start), min((number + 1) * size, start + self.size(epoch, window))
        shuffled_N2 = super()._shard_rows_in_window(epoch, window, np.arange(begin - start, end - start))
        by_length_N2 = shuffled_N2[np.argsort(self._lengths_of(shuffled_N2), kind="stable")]
        # Steps of 4 from position 6 to 17: edges 6, 8, 12, 16, 17, cuts of 2, 4, 4 and 1 slots.
        inner = np.arange(-(-(begin + 1) // self._step) * self._step, end, self._step)
        edges = np.concatenate([[begin], inner, [end]]) - begin
        sizes_C = np.diff(edges)
        # The shortest samples go to the cut that comes first in a random order of the cuts, and so on.
        key = (self._seed, PURPOSE_CUTS, epoch, window, number)
        order_C = Permutation(sizes_C.size, key).of(np.arange(sizes_C.size))
        found_N2, taken = np.empty_like(by_length_N2), 0
        for cut in order_C.tolist():
            found_N2[edges[cut] : edges[cut + 1]] = by_length_N2[taken : taken + sizes_C[cut]]
            taken += int(sizes_C[cut])
        return found_N2

    def _start(self, epoch: int, window: int) -> int:
        """Return the position of a window's first sample, counted from the beginning of the run."""
        before = self._epoch(epoch)[: window * self._window_shards]
        return epoch * int(self._rows.sum()) + int(self._rows[before].sum())
