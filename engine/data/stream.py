"""The order of samples: position in the run -> (epoch, window, slot) -> (shard, row), a pure function.

Shards are permuted per epoch and cut into windows of `window_shards`; the rows of a window are permuted among
themselves. So a reader keeps one window of shards at hand and the mixing is that of as many live shards, with
nothing materialised but one permutation of the shards. Invariant: an epoch visits each row of each shard exactly
once, in an order that depends on (seed, epoch, rows per shard, window_shards) alone. Reads no token.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from engine.data.order import Permutation

VERSION = 1
"""Changes with any change of the order; a saved loader state of another version is refused."""

PURPOSE_SHARDS = int.from_bytes(b"shards")
PURPOSE_SLOTS = int.from_bytes(b"slots")
"""What a permutation is for: part of its key, so that no two of them share a stream."""

_EPOCHS_KEPT = 2


class SampleId(NamedTuple):
    """Address of a sample: `slot` counts the samples of a window in the order in which they are read."""

    epoch: int
    window: int
    slot: int


class _Epoch(NamedTuple):
    shards: np.ndarray  # (shards,) int64: shard numbers in this epoch's order
    starts: np.ndarray  # (windows + 1,) int64: samples of the epoch before each window, and all of them


class SampleOrder:
    """Order of all samples of a data set, epoch after epoch."""

    def __init__(self, rows_per_shard: np.ndarray, seed: int, window_shards: int) -> None:
        """`rows_per_shard` (shards,) int64, not all 0."""
        self._rows = rows_per_shard.astype(np.int64)
        self._seed, self._window_shards = seed, window_shards
        self.samples_per_epoch = int(self._rows.sum())
        assert self.samples_per_epoch > 0
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def address(self, position: int) -> SampleId:
        """The sample at a position of the endless stream."""
        epoch, rest = divmod(position, self.samples_per_epoch)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, rest, side="right")) - 1
        return SampleId(epoch, window, rest - int(starts[window]))

    def position(self, sample: SampleId) -> int:
        """The position of a sample; inverse of `address`. Raises `ValueError` for an address that has none."""
        starts = self._epoch(sample.epoch).starts
        if not 0 <= sample.window < starts.size - 1:
            raise ValueError(f"window {sample.window} of {starts.size - 1}")
        start, end = starts[sample.window : sample.window + 2].tolist()
        if not 0 <= sample.slot < end - start:
            raise ValueError(f"slot {sample.slot} of {end - start}")
        return sample.epoch * self.samples_per_epoch + start + sample.slot

    def addresses(self, position: int, count: int) -> np.ndarray:
        """(count, 3) int64: epoch, window and slot of `count` samples from a position on."""
        parts = [
            np.stack([np.full(slots.size, sample.epoch), np.full(slots.size, sample.window), slots], axis=1)
            for sample, slots in self._runs(position, count)
        ]
        return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)

    def places(self, position: int, count: int) -> np.ndarray:
        """(count, 2) int64: shard and row of `count` samples from a position on."""
        parts = [self._places_in_window(sample, slots) for sample, slots in self._runs(position, count)]
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def _runs(self, position: int, count: int):
        """(first sample, slots) of each window that the samples of a stretch fall into."""
        end = position + count
        while position < end:
            sample = self.address(position)
            starts = self._epoch(sample.epoch).starts
            left_in_window = int(starts[sample.window + 1] - starts[sample.window]) - sample.slot
            taken = min(left_in_window, end - position)
            yield sample, np.arange(sample.slot, sample.slot + taken, dtype=np.int64)
            position += taken

    def _places_in_window(self, sample: SampleId, slots: np.ndarray) -> np.ndarray:
        shards = self._window(sample.epoch, sample.window)
        ends = np.cumsum(self._rows[shards])
        key = (self._seed, PURPOSE_SLOTS, sample.epoch, sample.window)
        images = Permutation(int(ends[-1]), key).of(slots)
        which = np.searchsorted(ends, images, side="right")
        rows = images - (ends[which] - self._rows[shards[which]])
        return np.stack([shards[which], rows], axis=1)

    def _window(self, epoch: int, window: int) -> np.ndarray:
        start = window * self._window_shards
        return self._epoch(epoch).shards[start : start + self._window_shards]

    def _epoch(self, epoch: int) -> _Epoch:
        """The shards' order and the windows' sizes of an epoch: O(shards) once, then remembered for a while."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = Permutation(self._rows.size, (self._seed, PURPOSE_SHARDS, epoch)).of(np.arange(self._rows.size))
            per_window = np.add.reduceat(self._rows[shards], np.arange(0, self._rows.size, self._window_shards))
            found = _Epoch(shards, np.concatenate([[0], np.cumsum(per_window)]))
            self._epochs[epoch] = found
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return found
