"""Source of each sample of a mixture: a pure function of its position in the stream.

Weights are whole numbers, constant or changing at given positions. A source's exact share up to a position is the sum,
over the positions before it, of the source's weight there divided by the sum of the weights. Sample j of a source may
come once its exact share has reached j and has to come before the share has passed j + 1; the earliest deadline comes
first (Tijdeman 1980, "The chairman assignment problem"; as unit jobs with windows: Baruah et al. 1996, "Proportionate
progress"). All of them fit, across changes of the weights, too, since the exact shares themselves are a schedule of the
fluid kind and unit jobs with whole releases and deadlines lose nothing by not being divisible.

Invariant: between any position and the last at which the shares began anew, each source has given its exact share to
within less than one sample. They begin anew where a source has reached its limit (it gives no more; the others go on in
their proportions) and where a run goes on with other weights than before. Addresses inside a source are the business of
`sample_order`.

K sources.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np


class Mixture(Protocol):
    """The sources of a stream's positions."""

    @property
    def num_samples(self) -> int | None:
        """Length of the stream; None without end."""
        ...

    def of(self, position: int, count: int) -> np.ndarray:
        """Return the sources of `count` positions from one on, (count,) int64; all of them before `num_samples`."""
        ...

    def counts(self, position: int) -> np.ndarray:
        """Return the samples of each source before a position, (K,) int64."""
        ...


class _Segment(NamedTuple):
    start: int  # position
    counts_K: np.ndarray  # int64: samples of each source before it
    table: np.ndarray  # source of each position from `start` on, repeated to the end
    end: int | None  # position behind the last; None without end


class Mixing(Mixture):
    """A mixture of K sources by their weights."""

    def __init__(
        self,
        parts: Sequence[int],
        limits: Sequence[int | None],
        later: Sequence[tuple[int, Sequence[int]]] = (),
        start: int = 0,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Mix sources with weights `parts` (K,) of 0 or more, each up to its limit of samples; None means no limit.

        From each position of `later` (rising) on, its weights are in force. The mixture begins at position `start`,
        before which the sources have given `counts` (K,) samples; it knows nothing of earlier positions.
        """
        self._limits = limits
        rows = [row for row in later if row[0] > start]
        before = [row for row in later if row[0] <= start]
        given = np.array(counts if counts is not None else [0] * len(parts), np.int64)
        table = [(start, tuple(before[-1][1] if before else parts)), *((first, tuple(row)) for first, row in rows)]
        self._segments = list(self._mix(table, given))
        self._starts = [segment.start for segment in self._segments]
        # where every source is at its limit from the beginning, there is no segment
        self._nothing = _Segment(start, given, np.zeros(1, np.uint8), start)

    @property
    def num_sources(self) -> int:
        return len(self._limits)

    @property
    def num_samples(self) -> int | None:
        """Length of the stream; None without end."""
        return self._segments[-1].end if self._segments else self._nothing.start

    def of(self, position: int, count: int) -> np.ndarray:
        """Return the sources of `count` positions from one on, (count,) int64; all of them before `num_samples`."""
        found = []
        while count:
            segment = self._segment(position)
            taken = count if segment.end is None else min(count, segment.end - position)
            indices = np.arange(position - segment.start, position - segment.start + taken) % segment.table.size
            found.append(segment.table[indices])
            position, count = position + taken, count - taken
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def counts(self, position: int) -> np.ndarray:
        """Return the samples of each source before a position, (K,) int64."""
        return _counts(self._segment(position), position)

    def _segment(self, position: int) -> _Segment:
        return self._segments[bisect_right(self._starts, position) - 1] if self._segments else self._nothing

    def _mix(self, table: list[tuple[int, tuple[int, ...]]], counts_K: np.ndarray) -> Iterator[_Segment]:
        """Yield the segments of the rows (first position, weights) of a table."""
        position, owed = table[0][0], (Fraction(0),) * len(counts_K)
        for number in range(len(table)):
            end = table[number + 1][0] if number + 1 < len(table) else None
            while end is None or position < end:
                coming = [(first, self._live(parts, counts_K)) for first, parts in table[number:]]
                parts = coming[0][1]
                if not any(parts):
                    return
                begin, dry = position, None
                for segment in _evenly(position, counts_K, parts, owed, coming[1:]):
                    dry = self._dry(segment)
                    found = segment if dry is None else segment._replace(end=dry)
                    yield found
                    if found.end is None:
                        return
                    position, before_K, counts_K = found.end, counts_K, _counts(found, found.end)
                    given_K = counts_K - before_K
                    owed = _still_owed(owed, parts, found.end - found.start, given_K)
                    if dry is not None:
                        break
                if dry is not None:
                    # weights 6 and 4, of which the second gives 40 samples at most: period 5 (3 + 2) up to position
                    # 100, where it has given its 40; then a segment in which the first gives every sample
                    owed = (Fraction(0),) * len(parts)
                assert position > begin

    def _live(self, parts: Sequence[int], counts_K: np.ndarray) -> tuple[int, ...]:
        """Return the weights without those of sources that have reached their limits, and without common divisors."""
        left = [
            part if limit is None or given < limit else 0
            for part, limit, given in zip(parts, self._limits, counts_K.tolist(), strict=True)
        ]
        divisor = math.gcd(*left) or 1
        return tuple(part // divisor for part in left)

    def _dry(self, segment: _Segment) -> int | None:
        """Return the position after the first sample of a segment with which a source reaches its limit; None where
        none does."""
        ends = []
        per_period = np.bincount(segment.table, minlength=len(self._limits))
        for k, (limit, given) in enumerate(zip(self._limits, segment.counts_K.tolist(), strict=True)):
            if limit is not None and given < limit and per_period[k]:
                # the last sample of source k is number `limit - 1`: so many whole periods, then its `rest`-th in one
                periods, rest = divmod(limit - given - 1, int(per_period[k]))
                index = int(np.flatnonzero(segment.table == k)[rest])
                ends.append(segment.start + periods * segment.table.size + index + 1)
        first = min(ends, default=None)
        return first if first is not None and (segment.end is None or first <= segment.end) else None


def _counts(segment: _Segment, position: int) -> np.ndarray:
    num_sources = len(segment.counts_K)
    # whole periods are counted at once, and only the rest of one sample by sample
    periods, rest = divmod(position - segment.start, segment.table.size)
    whole_K = np.bincount(segment.table, minlength=num_sources) if periods else 0
    return segment.counts_K + periods * whole_K + np.bincount(segment.table[:rest], minlength=num_sources)


def _still_owed(
    owed: tuple[Fraction, ...], parts: tuple[int, ...], num_samples: int, given_K: np.ndarray
) -> tuple[Fraction, ...]:
    """Return the exact shares less the samples given, by source, after `num_samples` more positions."""
    total = sum(parts)
    steps = zip(owed, parts, given_K.tolist(), strict=True)
    return tuple(before + Fraction(part * num_samples, total) - given for before, part, given in steps)


def _evenly(
    start: int,
    counts_K: np.ndarray,
    parts: tuple[int, ...],
    owed: tuple[Fraction, ...],
    coming: list[tuple[int, tuple[int, ...]]],
) -> Iterator[_Segment]:
    """Yield segments of constant weights from a position to the first of `coming` (positions and weights), or on
    without end."""
    end, period = (coming[0][0] if coming else None), sum(parts)
    # samples that are due behind a change of the weights have other deadlines than without it; they may come from
    # so many positions before it on
    tail = 0 if end is None else 1 + period // min(part for part in parts if part)
    states = {owed: 0}
    tables: list[np.ndarray] = []
    position, given_K = start, counts_K
    while end is None or position + period + tail <= end:
        # a period later the shares are as they were, to whole samples; soon they are exactly so, and all repeats
        table = _spread(parts, owed, period)
        counted_K = np.bincount(table, minlength=len(parts))
        tables.append(table)
        owed = _still_owed(owed, parts, period, counted_K)
        if owed in states:
            first = states[owed]
            cycle = np.concatenate(tables[first:])
            for number in range(first):
                yield _Segment(start + number * period, counts_K, tables[number], start + (number + 1) * period)
                counts_K = counts_K + np.bincount(tables[number], minlength=len(parts))
            begin = start + first * period
            if end is None:
                yield _Segment(begin, counts_K, cycle, None)
                return
            repeats = (end - tail - begin) // cycle.size
            position = begin + repeats * cycle.size
            yield _Segment(begin, counts_K, cycle, position)
            given_K = counts_K + repeats * np.bincount(cycle, minlength=len(parts))
            break
        states[owed] = len(tables)
        position, given_K = position + period, given_K + counted_K
    else:
        for number, table in enumerate(tables):
            yield _Segment(start + number * period, counts_K, table, start + (number + 1) * period)
            counts_K = counts_K + np.bincount(table, minlength=len(parts))
    if end is not None and position < end:
        rest = tuple((first - position, row) for first, row in coming)
        yield _Segment(position, given_K, _spread(parts, owed, end - position, rest), end)


@lru_cache(maxsize=256)
def _spread(
    parts: tuple[int, ...],
    owed: tuple[Fraction, ...],
    length: int,
    coming: tuple[tuple[int, tuple[int, ...]], ...] = (),
) -> np.ndarray:
    """Return the source of each of `length` positions, (length,) uint8 or int64.

    At their beginning the sources are `owed` parts of samples, which add up to 0. `coming` has the weights from some
    positions on (`length` is the first of them). Sample j of a source with share s may come from floor((j - owed) / s)
    on and has to come by ceil((j + 1 - owed) / s). All fit, so at every position each source is less than one sample
    from its share.
    """
    # parts (3, 1), period 4: the samples of source 0 may come from 0, 1, 2 on and are due by 2, 3, 4; that of source 1
    # from 0 on, due by 4. Of two that are due together the lower number comes first: the table is (0, 0, 0, 1)
    period = sum(parts)
    # in whole numbers: each position adds `rates[k]` units to the share of source k, and a sample is `unit` of them
    unit = math.lcm(period, *(part.denominator for part in owed))
    rates = [part * (unit // period) for part in parts]
    begun = [int(part * unit) for part in owed]

    def release(k: int, job: int) -> int | None:
        lacking = job * unit - begun[k]
        if lacking < 0:  # it was due to begin before
            return 0
        return lacking // rates[k] if rates[k] else None

    def deadline(k: int, job: int) -> float:
        lacking = (job + 1) * unit - begun[k]
        due = -(-lacking // rates[k]) if rates[k] else math.inf
        return _later(k, lacking - length * rates[k], unit, coming) if coming and due > length else due

    table = np.empty(length, np.uint8 if len(parts) <= 256 else np.int64)
    waiting: list[tuple[int, int, int]] = []  # (release, source, job)
    ready: list[tuple[float, int, int]] = []  # (deadline, source, job)

    def add(k: int, job: int) -> None:
        when = release(k, job)
        if when is not None:
            heapq.heappush(waiting, (when, k, job))

    for k in range(len(parts)):
        add(k, 0)
    for index in range(length):
        while waiting and waiting[0][0] <= index:
            _, k, job = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(k, job), k, job))
        _, k, job = heapq.heappop(ready)
        table[index] = k
        add(k, job + 1)
    return table


def _later(k: int, lacking: int, unit: int, coming: tuple[tuple[int, tuple[int, ...]], ...]) -> float:
    """Return the position by which a sample of source k is due that lacks some units of its share where the first of
    the coming weights begin."""
    left = Fraction(lacking, unit)
    for number, (first, parts) in enumerate(coming):
        share = Fraction(parts[k], sum(parts) or 1)
        due = first + math.ceil(left / share) if share else math.inf
        if number + 1 == len(coming) or due <= coming[number + 1][0]:
            return due
        left -= share * (coming[number + 1][0] - first)
    raise AssertionError("asked for with coming weights alone")
