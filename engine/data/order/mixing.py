"""Source of each sample of a mixture: a pure function of its position in the stream.

Weights are whole numbers; their sum is the period after which every source has given exactly its weight, and inside
a period samples are spread by earliest deadline (Tijdeman 1980, "The chairman assignment problem"; as unit jobs with
windows: Baruah et al. 1996, "Proportionate progress"). Invariant: between any position and the last at which a source
ran dry, each source has given its exact share to within less than one sample. A source that reaches its limit gives
no more; the others go on in their proportions. Addresses inside a source are the business of `sample_order`.

K sources.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class _Segment(NamedTuple):
    start: int  # position
    counts_K: np.ndarray  # int64: samples of each source before it
    parts: tuple[int, ...]  # weight of each source, 0 where it gives nothing
    end: int | None  # position behind the last; None without end


class Mixing:
    """The sources of a stream's positions."""

    def __init__(self, parts: Sequence[int], limits: Sequence[int | None]) -> None:
        """Mix sources with weights `parts` (K,) of 1 or more, each up to its limit of samples; None means no limit."""
        self._segments: list[_Segment] = []
        start, counts, left = 0, np.zeros(len(parts), np.int64), list(parts)
        while any(left):
            # weights 6 and 4, of which the second gives 40 samples at most: period 5 (3 + 2) up to position 100, where
            # it has given its 40; then a segment in which the first gives every sample
            divisor = math.gcd(*left)
            current = tuple(part // divisor for part in left)
            end = _end(start, counts, current, limits)
            self._segments.append(_Segment(start, counts, current, end))
            if end is None:
                break
            counts = self.counts(end)
            left = [part if limits[k] is None or counts[k] < limits[k] else 0 for k, part in enumerate(left)]
            start = end

    @property
    def num_samples(self) -> int | None:
        """Length of the stream; None without end."""
        return self._segments[-1].end

    def of(self, position: int, count: int) -> np.ndarray:
        """Return the sources of `count` positions from one on, (count,) int64; all of them before `num_samples`."""
        found = []
        while count:
            segment = self._segment(position)
            taken = count if segment.end is None else min(count, segment.end - position)
            table = _spread(segment.parts)
            places = np.arange(position - segment.start, position - segment.start + taken) % table.size
            found.append(table[places])
            position, count = position + taken, count - taken
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def counts(self, position: int) -> np.ndarray:
        """Return the samples of each source before a position, (K,) int64."""
        segment = self._segment(position)
        # whole periods give each source exactly its weight; only the rest of one is counted
        periods, rest = divmod(position - segment.start, sum(segment.parts))
        inside = np.bincount(_spread(segment.parts)[:rest], minlength=len(segment.parts))
        return segment.counts_K + periods * np.array(segment.parts, np.int64) + inside

    def _segment(self, position: int) -> _Segment:
        return self._segments[bisect_right([segment.start for segment in self._segments], position) - 1]


def _end(start: int, counts_K: np.ndarray, parts: tuple[int, ...], limits: Sequence[int | None]) -> int | None:
    """Return the position after the first sample with which a source reaches its limit; None where none ever does."""
    ends = []
    for k, (part, limit) in enumerate(zip(parts, limits, strict=True)):
        if part and limit is not None:
            # the last sample of source k is number `limit - 1`: so many whole periods, then its `rest`-th in one
            periods, rest = divmod(limit - int(counts_K[k]) - 1, part)
            place = int(np.flatnonzero(_spread(parts) == k)[rest])
            ends.append(start + periods * sum(parts) + place + 1)
    return min(ends, default=None)


@lru_cache(maxsize=64)
def _spread(parts: tuple[int, ...]) -> np.ndarray:
    """Return the source of each position in a period, (sum of parts,) uint8 or int64.

    Job j of source k may run from floor(j / share) on and must have run by ceil((j + 1) / share); the earliest deadline
    runs first. All fit, so at every place each source is less than one sample from its share.
    """
    # parts (3, 1), period 4: the jobs of source 0 may run from 0, 1, 2 on and are due by 2, 3, 4; that of source 1 from
    # 0 on, due by 4. Of two that are due together the lower number runs: the table is (0, 0, 0, 1)
    period = sum(parts)
    table = np.empty(period, np.uint8 if len(parts) <= 256 else np.int64)
    waiting = [(0, k, 0) for k, part in enumerate(parts) if part]  # (release, source, job)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, job)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, k, job = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(job + 1) * period // parts[k]), k, job))
        _, k, job = heapq.heappop(ready)
        table[place] = k
        if job + 1 < parts[k]:
            heapq.heappush(waiting, ((job + 1) * period // parts[k], k, job + 1))
    return table
