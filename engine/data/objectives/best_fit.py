"""Packing whole documents: each goes into the row of its shard where least room would be left.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit decreasing; departures: per shard, and the
open rows are found with the bits of one integer instead of a tree). A document longer than a row is cut into full
rows and a rest. Invariant: the rows of a shard follow from its document offsets and the capacity alone, so nothing
is stored and a restart lays out one window anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from engine.data.objectives.packing import Row, forgotten_at
from engine.data.shards.dataset import Shard, TokenDataset

_PLANS_KEPT = 128


class _Plan(NamedTuple):
    starts: np.ndarray  # (pieces,) int64: first token in the shard, row after row
    lengths: np.ndarray  # (pieces,) int64
    rows: np.ndarray  # (rows + 1,) int64: pieces before each row, and all of them


class BestFit:
    """Rows of whole documents, the longest of a row first."""

    name = "best_fit"

    def __init__(self, dataset: TokenDataset, capacity: int, lookahead: bool, extra: int = 0) -> None:
        """With `lookahead`, rows hold the tokens that have a successor; a document takes `extra` more positions."""
        self._dataset, self._capacity, self._lookahead, self._extra = dataset, capacity, lookahead, extra
        self._plans: OrderedDict[int, _Plan] = OrderedDict()

    def count(self, shards: np.ndarray) -> np.ndarray:
        return np.array([self._plan(number).rows.size - 1 for number in shards.tolist()], np.int64)

    def row(self, shard: Shard, number: int, row: int) -> Row:
        plan = self._plan(number)
        pieces = slice(*plan.rows[row : row + 2].tolist())
        spans = list(zip(plan.starts[pieces].tolist(), plan.lengths[pieces].tolist(), strict=True))
        tokens = np.concatenate([shard.tokens[start : start + length] for start, length in spans])
        starts = np.cumsum(plan.lengths[pieces])[:-1]
        predicted = [np.arange(start, start + length) + self._lookahead for start, length in spans]
        forgotten = forgotten_at(shard, np.concatenate(predicted)) if len(shard.forgotten) else None
        if not self._lookahead:
            return Row(tokens, None, starts, starts - 1, forgotten)
        successors = np.concatenate([shard.tokens[start + 1 : start + length + 1] for start, length in spans])
        # no `ends`: a piece holds only tokens whose successor is in its own document
        return Row(tokens, successors, starts, np.empty(0, np.int64), forgotten)

    def rows_of(self, number: int, documents: np.ndarray) -> np.ndarray:
        plan, (bounds, _) = self._plan(number), self._dataset.offsets(number)
        pieces = np.flatnonzero(np.isin(np.searchsorted(bounds, plan.starts, side="right") - 1, documents))
        return np.unique(np.searchsorted(plan.rows, pieces, side="right") - 1)

    def ranges(self, shard_rows_N2: np.ndarray) -> np.ndarray:
        """Return (shard, first token, the one behind the last) of the pieces of rows (shard, row), (M, 3) int64."""
        found = [np.empty((0, 3), np.int64)]
        for number, row in shard_rows_N2.tolist():
            plan = self._plan(number)
            pieces = slice(*plan.rows[row : row + 2].tolist())
            starts = plan.starts[pieces]
            found.append(np.stack([np.full_like(starts, number), starts, starts + plan.lengths[pieces]], axis=1))
        return np.concatenate(found)

    def _plan(self, number: int) -> _Plan:
        found = self._plans.get(number)
        if found is None:
            documents, _ = self._dataset.offsets(number)
            found = self._plans[number] = plan(documents, self._capacity, self._lookahead, self._extra)
            if len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return found


def plan(documents: np.ndarray, capacity: int, lookahead: bool, extra: int) -> _Plan:
    """Return the rows of a shard with these document offsets (documents + 1,).

    Example: documents of 5 and 2 tokens with room for 3 are pieces of 3, 2 and 2, each in a row of its own.
    """
    sizes = np.diff(documents) - lookahead  # with lookahead, a document's last token is a target alone
    room = capacity - extra
    parts = -(-sizes // room)  # of each document
    # the document of each piece, and the piece's number within it: parts [2, 1] are [0, 0, 1] and [0, 1, 0]
    which = np.repeat(np.arange(sizes.size), parts)
    part = np.arange(which.size) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = documents[which] + part * room
    lengths = np.minimum(room, sizes[which] - part * room)
    bins = best_fit_decreasing(lengths + extra, capacity)
    # by row, then the longest piece first; bins (0, 0, 1) in that order make rows [0, 2, 3]
    order = np.lexsort((starts, -lengths, bins))
    rows = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2))
    return _Plan(starts[order], lengths[order], rows)


def best_fit_decreasing(costs: np.ndarray, capacity: int) -> np.ndarray:
    """Return each item's bin, (n,) int64: by falling cost, each into the bin with the least room that is enough."""
    # costs (5, 4, 3, 3), capacity 8: 5 and 4 open bins 0 and 1, rooms 3 and 4; the first 3 fits bin 0 best, the second
    # bin 1
    bins = np.empty(costs.size, np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = count = 0  # bit r is set where a bin has room r
    values = costs.tolist()
    # stable: of equal costs the earlier comes first, on every machine
    for item in np.argsort(-costs, kind="stable").tolist():
        cost = values[item]
        if enough := open_rooms >> cost:
            # the lowest bit that is set, at `cost` or above: the smallest room that is large enough
            room = cost + (enough & -enough).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        if left := room - cost:
            by_room[left].append(chosen)
            open_rooms |= 1 << left
    return bins
