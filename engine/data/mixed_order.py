"""The order of samples over all sources: the mixture gives the source of each position, that source's order the sample.

Invariant: the samples after a cursor are a function of (sources, weights, samples left out, shards lost, cursor) alone;
no token is read. `engine.data.stream` keeps the cursor of a run.

N samples, K sources, S steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.data.objectives.joined import JoinedSampler
from engine.data.order.mixing import Mixture
from engine.data.order.sample_order import SampleId
from engine.data.source import Source
from engine.errors import DataError

Interval = tuple[int, int]
"""Positions of samples: the first, and the one after the last."""


class Cursor(NamedTuple):
    """A position in the stream: samples drawn so far, and the address of the next sample of each source."""

    position: int
    addresses: tuple[SampleId, ...]

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """(epoch, window) that the next sample of each source is in, or was the last of."""
        return [address[:2] for address in self.addresses]


class Samples(NamedTuple):
    """`sources_N` int64 and `addresses_N3` (epoch, window, slot) int64 of samples in their order."""

    sources_N: np.ndarray
    addresses_N3: np.ndarray

    @property
    def size(self) -> int:
        return self.sources_N.size

    def at(self, which: np.ndarray | slice) -> Samples:
        """Return the samples at some numbers, or where `which` is true."""
        if isinstance(which, slice):
            return Samples(self.sources_N[which], self.addresses_N3[which])
        numbers = np.flatnonzero(which) if which.dtype == bool else which
        # `take` copies rows of three some times as fast as an index does
        return Samples(self.sources_N.take(numbers), self.addresses_N3.take(numbers, axis=0))

    @classmethod
    def joined(cls, parts: list[Samples]) -> Samples:
        """Return all samples of one or more parts, in order."""
        return parts[0] if len(parts) == 1 else cls(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class MixedOrder:
    """The samples of a run, one position after the other, without those that it leaves out or has lost."""

    sources: tuple[Source, ...]
    mixing: Mixture
    joined: JoinedSampler | None = None
    """Sampler of all sources together; None where they are read one by one."""
    left_out: tuple[Interval, ...] = ()
    """Samples that are passed over, by position: disjoint, in order."""

    def take(self, cursor: Cursor, count: int) -> tuple[Samples, Cursor]:
        """Return the next `count` samples that are neither left out nor in a lost shard, and the cursor after them.

        Raises:
            DataError: the data ends before.
        """
        kept: list[Samples] = []
        while count:
            # each round ends at the next left-out interval, or has fewer samples than asked for because of lost shards
            cursor, reach = self._past_left_out(cursor)
            found, cursor = self._in_a_row(cursor, min(count, reach or count))
            if any(source.lost.size for source in self.sources):
                found = found.at(self._is_kept(found))
            kept.append(found)
            count -= found.size  # those in lost shards are made up for by the samples that follow
        return Samples.joined(kept or [Samples(np.empty(0, np.int64), np.empty((0, 3), np.int64))]), cursor

    def take_steps(self, cursor: Cursor, sizes: Sequence[int]) -> list[tuple[Samples, Cursor]]:
        """Return the samples of the next steps, of these sizes, and the cursor after each, as a call of `take` for each
        of them would: one step or more, and none beside one in which a source leaves its window.

        Raises:
            DataError: the data ends before the first step does.
        """
        ends_S = np.cumsum(sizes)
        if (most := self.mixing.num_samples) is not None:
            ends_S = ends_S[ends_S <= most - cursor.position]
        is_left_out = any(end > cursor.position for _, end in self.left_out)
        if len(ends_S) < 2 or is_left_out or any(source.lost.size for source in self.sources):
            return self._one_by_one(cursor, sizes[: max(1, len(ends_S))])
        sources_N = self.mixing.of(cursor.position, int(ends_S[-1]))
        numbers_K = self._numbers(sources_N)
        # (S,) arrays: samples of a source up to the end of each step
        given_K = [np.searchsorted(numbers, ends_S) for numbers in numbers_K]
        stays_S = np.ones(len(ends_S), bool)
        for source, address, given_S in zip(self.sources, cursor.addresses, given_K, strict=True):
            stays_S &= given_S < source.order.left(address)
        # the offsets of a window that comes later are not read before they are due
        ends_S = ends_S[: max(1, np.count_nonzero(stays_S))]
        found_K, following_K = [], []
        for source, address, given_S in zip(self.sources, cursor.addresses, given_K, strict=True):
            given = given_S[: len(ends_S)]
            count = int(given[-1])
            found_K.append(source.order.addresses(address, count))
            # the next sample behind each step: given 2 and 3 of the samples at slots 4, 5, 6, those at slots 6 and 7
            all_N3 = np.concatenate([found_K[-1], [self._advanced_one(source, address, count)]])
            following_K.append([SampleId(*row) for row in all_N3.take(given, axis=0).tolist()])
        addresses_N3 = _interleaved(found_K, numbers_K)
        starts = [0, *ends_S.tolist()]
        found = [Samples(sources_N[a:b], addresses_N3[a:b]) for a, b in itertools.pairwise(starts)]
        positions = (cursor.position + end for end in starts[1:])
        return list(zip(found, map(Cursor, positions, zip(*following_K, strict=True)), strict=True))

    def _one_by_one(self, cursor: Cursor, sizes: Sequence[int]) -> list[tuple[Samples, Cursor]]:
        """Return `take_steps` by a call of `take` for each step."""
        found = [self.take(cursor, sizes[0])]
        for size in sizes[1:]:
            before = found[-1][1]
            if before.windows != cursor.windows:
                break
            try:
                step = self.take(before, size)
            except DataError:  # raised again when that step is due
                break
            if step[1].windows != cursor.windows:
                break
            found.append(step)
        return found

    def between(self, cursor: Cursor, end: int, most: int) -> Iterator[Samples]:
        """Yield the samples from a cursor up to position `end` that are neither left out nor in a lost shard, at most
        `most` at a time."""
        while cursor.position < end:
            cursor, reach = self._past_left_out(cursor)
            count = min(most, end - cursor.position, reach or most)
            if count > 0:  # an interval that is left out may reach behind the end
                found, cursor = self._in_a_row(cursor, count)
                yield found.at(self._is_kept(found))

    def shard_rows(self, samples: Samples) -> np.ndarray:
        """Return shard and row of the samples, (N, 2) int64; those of a source stand in its order."""
        if len(self.sources) == 1:
            return self.sources[0].order.shard_rows_at(samples.addresses_N3)
        numbers_K = self._numbers(samples.sources_N)
        addresses_K = [samples.addresses_N3.take(numbers, axis=0) for numbers in numbers_K]
        found_K = [source.order.shard_rows_at(found) for source, found in zip(self.sources, addresses_K, strict=True)]
        return _interleaved(found_K, numbers_K)

    def _past_left_out(self, cursor: Cursor) -> tuple[Cursor, int | None]:
        """Return the next cursor that is not left out, and the samples until the next one that is (None: no such)."""
        for first, end in self.left_out:
            if cursor.position < first:
                return cursor, first - cursor.position
            if cursor.position < end:
                # each source moves on by what it would have given: nothing after the interval depends on leaving it out
                counts_K = self.mixing.counts(end) - self.mixing.counts(cursor.position)
                cursor = Cursor(end, self._advanced(cursor.addresses, counts_K.tolist()))
        return cursor, None

    def _in_a_row(self, cursor: Cursor, count: int) -> tuple[Samples, Cursor]:
        """Return the next `count` samples, those in lost shards included, and the cursor after them."""
        end = cursor.position + count
        if self.mixing.num_samples is not None and end > self.mixing.num_samples:
            raise DataError(
                f"the data ends with sample {self.mixing.num_samples:,}: each source has come to its epochs or "
                "max_tokens",
                "enough samples for the whole stage, and for what it leaves out",
                "raise data.sources.*.epochs or max_tokens, or shorten the stage",
            )
        if len(self.sources) == 1:
            (address,), order = cursor.addresses, self.sources[0].order
            found = Samples(np.zeros(count, np.int64), order.addresses(address, count))
            return found, Cursor(end, (order.after(address, count),))
        # sources_N (0, 1, 0): source 0 gives its next two samples to rows 0 and 2, source 1 its next one to row 1
        sources_N = self.mixing.of(cursor.position, count)
        numbers_K = self._numbers(sources_N)
        counts = [numbers.size for numbers in numbers_K]
        parts = zip(self.sources, cursor.addresses, counts, strict=True)
        found_K = [source.order.addresses(address, size) for source, address, size in parts]
        after = Cursor(end, self._advanced(cursor.addresses, counts))
        return Samples(sources_N, _interleaved(found_K, numbers_K)), after

    def _numbers(self, sources_N: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of the samples of each source, rising."""
        return [np.flatnonzero(sources_N == source.number) for source in self.sources]

    def _advanced(self, addresses: tuple[SampleId, ...], counts: list[int]) -> tuple[SampleId, ...]:
        return tuple(itertools.starmap(self._advanced_one, zip(self.sources, addresses, counts, strict=True)))

    @staticmethod
    def _advanced_one(source: Source, address: SampleId, count: int) -> SampleId:
        # a source that gave nothing keeps its address: `after` may have to read the offsets of its window
        return source.order.after(address, count) if count else address

    def _is_kept(self, samples: Samples) -> np.ndarray:
        """Return True for samples that are in no lost shard, (N,) bool."""
        shard_rows_N2, kept_N = self.shard_rows(samples), np.empty(samples.size, bool)
        for source in self.sources:
            mine = samples.sources_N == source.number
            kept_N[mine] = source.is_kept(shard_rows_N2[mine])
        return kept_N


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the positions as disjoint intervals in order, with a gap between any two."""
    found: list[Interval] = []
    for first, end in sorted(intervals):
        # (0, 3), (3, 5), (7, 9) become (0, 5), (7, 9): intervals that touch are one
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif first < end:
            found.append((first, end))
    return tuple(found)


def _interleaved(rows_K: list[np.ndarray], numbers_K: list[np.ndarray]) -> np.ndarray:
    """Return the rows of all sources as one array: row i of source k at `numbers_K[k][i]`.

    A source may have more numbers than rows; those of the rows are then the first ones of all. Rows [a, c] and [b] at
    numbers [0, 2] and [1] are [a, b, c].
    """
    if len(rows_K) == 1:
        return rows_K[0]
    rows = np.concatenate(rows_K)
    given_K = [numbers[: len(part)] for part, numbers in zip(rows_K, numbers_K, strict=True)]
    places = np.empty(len(rows), np.int64)
    places[np.concatenate(given_K)] = np.arange(len(rows))
    # a scatter of numbers and a `take` of rows are together some times as fast as a scatter of rows
    return rows.take(places, axis=0)
