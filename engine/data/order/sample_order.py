"""The order of samples: a position of the run -> (epoch, window, slot) -> (shard, row), a pure function.

Shards are permuted per epoch and cut into windows of `window_shards`; the rows of a window are permuted among
themselves. So a reader keeps one window of shards at hand and the mixing is that of as many live shards, with
nothing materialised but one permutation of the shards. How many rows a shard has is asked window by window, since
some ways of packing know it only from the documents' offsets. Invariant: an epoch visits each row of each shard
exactly once, in an order that depends on (seed, epoch, rows per shard, window_shards) alone. Reads no token.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from engine.data.order.permutation import Permutation

VERSION = 1
"""Changes with any change of the order; a saved loader state of another version is refused."""

PURPOSE_SHARDS = int.from_bytes(b"shards")
PURPOSE_SLOTS = int.from_bytes(b"slots")
"""Purpose of a permutation: part of its key, so that no two of them share a stream."""

_BLOCK_SLOTS = 1024
"""Slots whose shard and row are computed together: steps follow one another, and a call for few costs nearly as much.
More would delay the first batch."""
_BLOCKS_KEPT = 16
_EPOCHS_KEPT = 2  # the one in use, and the next, whose first windows are read ahead
_WINDOWS_KEPT = 8

CountRows = Callable[[np.ndarray], np.ndarray]
"""(n,) shard numbers -> (n,) int64 rows in each."""


class SampleId(NamedTuple):
    """Address of a sample: `slot` counts the samples of a window in the order in which they are read."""

    epoch: int
    window: int
    slot: int


START = SampleId(0, 0, 0)
"""Address at which a run begins."""


class Order(Protocol):
    """The samples of one source, one after the other without end, each with an address of its own (`SampleId`)."""

    def after(self, sample: SampleId, count: int) -> SampleId:
        """Return the sample that follows `count` samples after another."""
        ...

    def left(self, sample: SampleId) -> int:
        """Return the samples of a window from one on to its end."""
        ...

    def check(self, sample: SampleId) -> SampleId:
        """Return the same address. Raises `ValueError` where there is no such sample."""
        ...

    def addresses(self, sample: SampleId, count: int) -> np.ndarray:
        """Return epoch, window and slot of `count` samples from one on, (count, 3) int64."""
        ...

    def shard_rows_at(self, addresses: np.ndarray) -> np.ndarray:
        """Return shard and row of the samples at rising addresses (n, 3), (n, 2) int64."""
        ...

    def shards(self, epoch: int, window: int) -> np.ndarray:
        """Return the numbers of the shards that the samples of a window lie in, (shards,) int64."""
        ...

    def shards_ahead(self, sample: SampleId, windows: int) -> np.ndarray:
        """Return the numbers of the shards of the window that comes so many windows after a sample's."""
        ...


class _Window(NamedTuple):
    shards: np.ndarray  # (shards,) int64: shard numbers in this epoch's order
    ends: np.ndarray  # (shards,) int64: rows of the window up to the end of each shard


class SampleOrder(Order):
    """Order of all samples of a data set, epoch after epoch.

    A sample is an address; the one after a window's last is the first of the next window that has any. Methods take
    any slot up to and with the window's size as the place from which on they count.
    """

    def __init__(self, num_shards: int, count_rows: CountRows, seed: int, window_shards: int) -> None:
        """Make the order of the rows that `count_rows` reports. Some shard must have one, or `after` never returns."""
        self._num_shards, self._count_rows = num_shards, count_rows
        self._seed, self._window_shards = seed, window_shards
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    @property
    def num_windows(self) -> int:
        return -(-self._num_shards // self._window_shards)

    def size(self, epoch: int, window: int) -> int:
        """Return the number of samples of a window. Raises `DataError` if offsets of one of its shards are damaged."""
        ends = self._window(epoch, window).ends
        return int(ends[-1])

    def after(self, sample: SampleId, count: int) -> SampleId:
        """Return the sample that follows `count` samples after another: itself for 0, if it is one."""
        epoch, window, slot = sample
        slot += count
        # also steps over windows without a row: no slot is below a size of 0
        while slot >= (size := self.size(epoch, window)):
            slot -= size
            epoch, window = (epoch, window + 1) if window + 1 < self.num_windows else (epoch + 1, 0)
        return SampleId(epoch, window, slot)

    def left(self, sample: SampleId) -> int:
        """Return the samples of a window from one on to its end."""
        return self.size(sample.epoch, sample.window) - sample.slot

    def check(self, sample: SampleId) -> SampleId:
        """Return the address. Raises `ValueError` where there is no such sample (and it is not `START`)."""
        if sample.epoch < 0 or not 0 <= sample.window < self.num_windows:
            raise ValueError(f"epoch {sample.epoch}, window {sample.window} of {self.num_windows}")
        size = self.size(sample.epoch, sample.window)
        # a run that has read nothing stands at START, also where the first window has no row
        if not 0 <= sample.slot < size and sample != START:
            raise ValueError(f"slot {sample.slot} of {size}")
        return sample

    def addresses(self, sample: SampleId, count: int) -> np.ndarray:
        """Return epoch, window and slot of `count` samples from one on, (count, 3) int64."""
        found, at = np.empty((count, 3), np.int64), 0
        for first, taken in self._runs(sample, count):
            found[at : at + taken, 0], found[at : at + taken, 1] = first.epoch, first.window
            found[at : at + taken, 2] = np.arange(first.slot, first.slot + taken)
            at += taken
        return found

    def shard_rows(self, sample: SampleId, count: int) -> np.ndarray:
        """Return shard and row of `count` samples from one on, (count, 2) int64."""
        return self.shard_rows_at(self.addresses(sample, count))

    def shard_rows_at(self, addresses: np.ndarray) -> np.ndarray:
        """Return shard and row of the samples at addresses (n, 3) in rising order, (n, 2) int64."""
        windows = addresses[:, :2]
        if len(windows) and windows[0].tolist() == windows[-1].tolist():  # as nearly always
            return self._shard_rows_in_window(int(windows[0, 0]), int(windows[0, 1]), addresses[:, 2])
        # (n - 1, 2) -> rows at which (epoch, window) changes: addresses rise, so each window is one run
        cuts = np.flatnonzero((windows[1:] != windows[:-1]).any(axis=1)) + 1
        edges = [0, *cuts.tolist(), len(addresses)]
        parts = [
            self._shard_rows_in_window(int(windows[first, 0]), int(windows[first, 1]), addresses[first:end, 2])
            for first, end in itertools.pairwise(edges)
            if end > first
        ]
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def shards(self, epoch: int, window: int) -> np.ndarray:
        """Return the numbers of a window's shards in their order, (shards,) int64."""
        start = window * self._window_shards
        return self._epoch(epoch)[start : start + self._window_shards]

    def shards_ahead(self, sample: SampleId, windows: int) -> np.ndarray:
        """Return the shards of the window that comes `windows` windows after a sample's, (shards,) int64."""
        # the last window of an epoch is followed by the first of the next
        epochs, window = divmod(sample.window + windows, self.num_windows)
        return self.shards(sample.epoch + epochs, window)

    def _runs(self, sample: SampleId, count: int) -> Iterator[tuple[SampleId, int]]:
        """Yield (first sample, number of samples) of each window that `count` samples from one on fall into."""
        while count:
            # the last round may have ended at a window's end, which is no sample's address
            sample = self.after(sample, 0)
            taken = min(self.size(sample.epoch, sample.window) - sample.slot, count)
            yield sample, taken
            count -= taken
            sample = sample._replace(slot=sample.slot + taken)

    def _shard_rows_in_window(self, epoch: int, window: int, slots: np.ndarray) -> np.ndarray:
        """Return shard and row of rising slots (n,) of a window, (n, 2) int64."""
        if not slots.size:
            return np.empty((0, 2), np.int64)
        first, last = int(slots[0]) // _BLOCK_SLOTS, int(slots[-1]) // _BLOCK_SLOTS
        parts = [self._block(epoch, window, number) for number in range(first, last + 1)]
        # slots 1020 to 1030 of blocks of 1024: blocks 0 and 1, seen from the beginning of block 0
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.take(slots - first * _BLOCK_SLOTS, axis=0)

    def _block(self, epoch: int, window: int, number: int) -> np.ndarray:
        """Return shard and row of each slot of a block, (slots, 2) int64: computed once, then cached."""
        found = self._blocks.get((epoch, window, number))
        if found is None:
            shards, ends = self._window(epoch, window)
            slots = np.arange(number * _BLOCK_SLOTS, min((number + 1) * _BLOCK_SLOTS, int(ends[-1])))
            images = Permutation(int(ends[-1]), (self._seed, PURPOSE_SLOTS, epoch, window)).of(slots)
            # shards (7, 2) of 3 and 2 rows: ends (3, 5). Image 3 is behind 1 end, so it is row 3 - 3 = 0 of shard 2;
            # `right`, since an image that equals an end is the first row of the next shard
            which = np.searchsorted(ends, images, side="right")
            starts = np.concatenate([[0], ends[:-1]])
            found = np.stack([shards[which], images - starts[which]], axis=1)
            self._blocks[epoch, window, number] = found
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return found

    def _window(self, epoch: int, window: int) -> _Window:
        """Return the shards and rows of a window: counted once, then cached."""
        found = self._windows.get((epoch, window))
        if found is None:
            shards = self.shards(epoch, window)
            found = _Window(shards, np.cumsum(self._count_rows(shards)))
            self._windows[epoch, window] = found
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the order of the shards in an epoch, (shards,) int64: O(shards) once, then cached."""
        found = self._epochs.get(epoch)
        if found is None:
            key = (self._seed, PURPOSE_SHARDS, epoch)
            found = Permutation(self._num_shards, key).of(np.arange(self._num_shards))
            self._epochs[epoch] = found
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return found
