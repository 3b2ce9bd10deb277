"""Positions of a stream that hold replayed samples, and the mixture of the new samples at the others.

Time goes in blocks, which are the steps of a run that leaves out no sample. The replayed samples up to a block's end
are the sum of ratio x size over the blocks, rounded down: the count of any run of blocks is exact to one sample. Inside
of a block they lie so that each data rank and each micro-batch holds its share to within one sample, whatever the
layout (powers of two; nearly so for other sizes). Invariant: both depend on the position, the batch sizes, the ratios
and where the shares began alone.

K sources, of which replay is the last; N positions, S blocks; O the power of two that a block's size is rounded up to.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.config.batch_ramp import Ramp
from engine.data.order.mixing import Mixing, Mixture
from engine.data.order.permutation import mix_array

_SPAN_POSITIONS = 1 << 13
"""Positions whose replayed samples are found together: steps follow one another, and a call of numpy for one step costs
nearly as much as for many."""
_SPANS_KEPT = 2  # that of what is read ahead, and that of what was trained on


class _Span(NamedTuple):
    """Whole blocks, one behind the other."""

    first: int  # position
    replayed_N: np.ndarray  # bool, of the N positions from `first` on
    counts: np.ndarray  # (N + 1,) int64: replayed samples from `start` up to each position, and up to the end

    @property
    def end(self) -> int:
        return self.first + self.replayed_N.size


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
        self._spans: tuple[_Span, ...] = ()

    def owed(self, position: int) -> Fraction:
        """Return the exact share up to a position less the replayed samples by then."""
        return Fraction(self._units(position), self._unit) - self.count(position)

    def count(self, position: int) -> int:
        """Return the replayed samples from `start` up to a position."""
        if position <= self._start:
            return 0
        span = self._span(position, through_end=True)
        return int(span.counts[position - span.first])

    def of(self, position: int, count: int) -> np.ndarray:
        """Return True for the replayed samples among `count` positions from one on, (count,) bool."""
        found, end = [], position + count
        while position < end:
            span = self._span(position)
            found.append(span.replayed_N[position - span.first : end - span.first])
            position = span.end
        if len(found) == 1:  # a view: nobody writes to it
            return found[0]
        return np.concatenate(found) if found else np.empty(0, bool)

    def _span(self, position: int, through_end: bool = False) -> _Span:
        """Return a span that has a position or, with `through_end`, ends there."""
        for span in self._spans:
            if span.first <= position < span.end + through_end:
                return span
        span = self._make_span(position)
        # replaced and never changed in place: the thread that reads ahead asks, too
        self._spans = (span, *self._spans)[:_SPANS_KEPT]
        return span

    def _make_span(self, position: int) -> _Span:
        """Return the blocks from the one around a position on, all of one size: as many as are found together."""
        step = self._batches.steps(position + 1) - 1
        first, end = max(self._start, self._batches.samples(step)), self._batches.samples(step + 1)
        size, num_steps = end - first, 1
        if size == self._batches.size(step):  # not a block that `start` has cut
            most = max(1, _SPAN_POSITIONS // size)
            while num_steps < most and self._batches.size(step + num_steps) == size:
                num_steps += 1
        # in Python's integers: units of many decimals are beyond 64 bits
        ends = np.array([self._rounded(first + size * number) for number in range(num_steps + 1)], np.int64)
        replayed_SN = _replayed_in_blocks(size, np.diff(ends), np.arange(step, step + num_steps))
        replayed_N = replayed_SN.ravel()
        return _Span(first, replayed_N, ends[0] + np.append(0, np.cumsum(replayed_N, dtype=np.int64)))

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
        self._num_samples = self._length()

    @property
    def num_samples(self) -> int | None:
        """Length of the stream, which ends with its last new sample; None without end."""
        return self._num_samples

    def _length(self) -> int | None:
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


def _replayed_in_blocks(size: int, counts_S: np.ndarray, steps_S: np.ndarray) -> np.ndarray:
    """Return True for `counts_S` of the `size` positions of each block, (S, size) bool; each step has others.

    Data rank and micro-batch of a position are ranges of its binary digits, where sizes are powers of two. Of numbers
    i below a power of two each such range of a position has to take every value equally often: digit s of the position
    is the sum modulo 2 of those digits c of i for which the binomial coefficient (s over c) is odd, since minors of
    Pascal's matrix of neighbouring rows and first columns are 1 (Faure 1982, "Discrepance de suites associees a un
    systeme de numeration", uses the same matrix). The step flips digits at random, which moves whole ranges: the rank
    that has the odd sample of a step is another one in the next.
    """
    order_O = _order(max(0, size - 1).bit_length())
    flips_S = (mix_array(steps_S.astype(np.uint64)) % np.uint64(order_O.size)).astype(np.int64)
    positions_SO = order_O ^ flips_S[:, None]
    # of sizes that are no power of two, positions beyond the size are passed over: those within it are numbered
    is_inside_SO = positions_SO < size
    is_chosen_SO = is_inside_SO & (np.cumsum(is_inside_SO, axis=1) <= counts_S[:, None])
    found_SN = np.zeros((steps_S.size, size), bool)
    blocks, columns = np.nonzero(is_chosen_SO)
    found_SN[blocks, positions_SO[blocks, columns]] = True
    return found_SN


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
