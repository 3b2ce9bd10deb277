"""Positions of a stream that hold replayed samples, and the mixture of the new samples at the others.

Time goes in blocks, which are the steps of a run that leaves out no sample. The replayed samples up to a block's end
are the sum of ratio x size over the blocks, rounded down: the count of any run of blocks is exact to one sample. Inside
of a block they lie so that each data rank and each micro-batch holds its share to within one sample, whatever the
layout (powers of two; nearly so for other sizes). Invariant: both depend on the position, the batch sizes, the ratios
and where the shares began alone.

K sources, of which replay is the last.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from engine.config.batch_ramp import Ramp
from engine.data.order.mixing import Mixing, Mixture
from engine.data.order.permutation import mix_array


class ReplayShare:
    """The replayed samples of a stream by position."""

    def __init__(
        self,
        ratios: Sequence[tuple[int, Fraction]],
        batches: Ramp,
        start: int = 0,
        owed: Fraction = Fraction(0),
    ) -> None:
        """Share out samples from position `start` on; `ratios` has (first step, ratio), its first row from step 0 on.

        `owed` is what the exact share at `start` was ahead of the samples given by then.
        """
        self._batches, self._start = batches, start
        # in whole numbers, which is many times faster: so many units are a sample
        self._unit = math.lcm(owed.denominator, *(ratio.denominator for _, ratio in ratios))
        rates = [int(ratio * self._unit) for _, ratio in ratios]
        self._firsts = [batches.samples(step) for step, _ in ratios]
        row = bisect_right(self._firsts, start) - 1
        # (first position, units at it, units of each position from there on) of each row from `start` on
        self._rows = [(start, int(owed * self._unit), rates[row])]
        for first, rate in zip(self._firsts[row + 1 :], rates[row + 1 :], strict=True):
            before, units, earlier = self._rows[-1]
            self._rows.append((first, units + earlier * (first - before), rate))
        self._firsts = [first for first, _, _ in self._rows]
        self._last = (0, 0, 0, 0)

    def owed(self, position: int) -> Fraction:
        """Return the exact share up to a position less the replayed samples by then."""
        return Fraction(self._units(position), self._unit) - self.count(position)

    def count(self, position: int) -> int:
        """Return the replayed samples from `start` up to a position."""
        if position <= self._start:
            return 0
        begin, size, replayed, step = self._block(position)
        inside = int(_replayed_in_block(size, replayed, step)[: position - begin].sum()) if position > begin else 0
        return self._rounded(begin) + inside

    def of(self, position: int, count: int) -> np.ndarray:
        """Return True for the replayed samples among `count` positions from one on, (count,) bool."""
        found, end = [], position + count
        while position < end:
            begin, size, replayed, step = self._block(position)
            positions = _replayed_in_block(size, replayed, step)[position - begin : end - begin]
            found.append(positions)
            position += positions.size
        return np.concatenate(found) if found else np.empty(0, bool)

    def _block(self, position: int) -> tuple[int, int, int, int]:
        """Return the first position, the size, the replayed samples and the number of the block around a position."""
        begin, size, _, _ = self._last
        if not begin <= position < begin + size:  # asked for some times in a row
            step = self._batches.steps(position + 1) - 1
            begin, end = max(self._start, self._batches.samples(step)), self._batches.samples(step + 1)
            self._last = begin, end - begin, self._rounded(end) - self._rounded(begin), step
        return self._last

    def _rounded(self, position: int) -> int:
        return max(0, self._units(position) // self._unit) if position > self._start else 0

    def _units(self, position: int) -> int:
        """Return what is owed at `start` and the exact share of the positions from there up to one."""
        first, units, rate = self._rows[bisect_right(self._firsts, position) - 1]
        return units + rate * (position - first)


class MixtureWithReplay(Mixture):
    """New samples by their own mixture, and replayed ones at the positions of a share."""

    def __init__(self, share: ReplayShare, new: Callable[[Callable[[int], int]], Mixing], start: int, replayed: int):
        """Mix from position `start` on, before which `replayed` samples were.

        `new` makes the mixture of the new samples; it is given the function from a position of the stream to the
        number of new samples before it."""
        self.share, self._start, self._replayed = share, start, replayed
        self._new = new(self._num_new)

    @property
    def num_samples(self) -> int | None:
        """Length of the stream, which ends with its last new sample; None without end."""
        most_new = self._new.num_samples
        if most_new is None:
            return None
        low, high = self._start, self._start + 1
        while self._num_new(high) < most_new:
            high = self._start + 2 * (high - self._start)
        while low < high:  # the first position with so many new samples before it
            middle = (low + high) // 2
            low, high = (low, middle) if self._num_new(middle) >= most_new else (middle + 1, high)
        return low

    def of(self, position: int, count: int) -> np.ndarray:
        """Return the sources of `count` positions from one on, (count,) int64; all of them before `num_samples`."""
        replayed_N = self.share.of(position, count)
        num_new = count - int(replayed_N.sum())
        sources_N = np.full(count, self._new.num_sources, np.int64)
        sources_N[~replayed_N] = self._new.of(self._num_new(position), num_new)
        return sources_N

    def counts(self, position: int) -> np.ndarray:
        """Return the samples of each source before a position, (K,) int64."""
        return np.append(self._new.counts(self._num_new(position)), self._replayed + self.share.count(position))

    def _num_new(self, position: int) -> int:
        return position - self._replayed - self.share.count(position)


@lru_cache(maxsize=64)
def _replayed_in_block(size: int, count: int, step: int) -> np.ndarray:
    """Return True for `count` of `size` positions of a block, (size,) bool; each step has others.

    Data rank and micro-batch of a position are ranges of its binary digits, where sizes are powers of two. Of numbers
    i below a power of two each such range of a position has to take every value equally often: digit s of the position
    is the sum modulo 2 of those digits c of i for which the binomial coefficient (s over c) is odd, since minors of
    Pascal's matrix of neighbouring rows and first columns are 1 (Faure 1982, "Discrepance de suites associees a un
    systeme de numeration", uses the same matrix). The step flips digits at random, which moves whole ranges: the rank
    that has the odd sample of a step is another one in the next.
    """
    order = _order(max(0, size - 1).bit_length())
    positions = order ^ np.int64(mix_array(np.array([step], np.uint64))[0] % np.uint64(order.size))
    found = np.zeros(size, bool)
    # of sizes that are no power of two, positions beyond the size are passed over
    found[positions[positions < size][:count]] = True
    return found


@lru_cache(maxsize=8)
def _order(num_digits: int) -> np.ndarray:
    """Return the position of each number below 2 ** `num_digits`, int64."""
    order = np.zeros(1, np.int64)
    for c in range(num_digits):
        # (s over c) is odd where the digits of c are among those of s (Lucas)
        column = sum(1 << s for s in range(num_digits) if c & s == c)
        # numbers (0, 1) at positions (0, 3): with the next digit, (2, 3) at (0 ^ column, 3 ^ column)
        order = np.concatenate([order, order ^ column])
    return order
