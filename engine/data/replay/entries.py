"""The entries of one domain: rows with the smallest keys, sorted; merging is concatenate, sort, cut.

Invariant: entries rise by (key, place), and no place comes twice. Merging two sets and cutting to the smallest keys is
commutative, associative and idempotent, so any split of the rows, in any order and with repeats, gives equal bytes. A
row that was admitted with two weights has the smaller of its two keys.

Arrays are replaced and never written to: a generation may hold views of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FRESH = np.uint16(2**15)
"""Bit of a length that marks an entry that no file has yet: a column of its own would be a tenth of the memory."""


@dataclass(frozen=True)
class Entries:
    """Entries by rising (key, row id): `keys` (n,) float64, `row_ids` (n,) uint64, `marked` (n,) uint16 lengths in
    tokens, with a bit for those that no file has yet. 18 bytes an entry."""

    keys: np.ndarray
    row_ids: np.ndarray
    marked: np.ndarray

    @classmethod
    def none(cls) -> Entries:
        """Return no entries."""
        return cls(np.empty(0, np.float64), np.empty(0, np.uint64), np.empty(0, np.uint16))

    @property
    def size(self) -> int:
        return self.keys.size

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the rows, (n,) uint16."""
        return self.marked & ~_FRESH

    @property
    def is_fresh(self) -> np.ndarray:
        """True for entries that no file has yet, (n,) bool."""
        return self.marked >= _FRESH

    def first(self, count: int) -> Entries:
        """Return the entries with the `count` smallest keys, as views where that is all."""
        if count >= self.size:
            return self
        # copies: a view would keep the whole arrays alive
        return Entries(self.keys[:count].copy(), self.row_ids[:count].copy(), self.marked[:count].copy())

    def part(self, start: int, end: int) -> Entries:
        """Return entries `start` to `end`, as views."""
        return Entries(self.keys[start:end], self.row_ids[start:end], self.marked[start:end])

    def at(self, which: np.ndarray) -> Entries:
        """Return the entries where `which` (n,) is true."""
        return Entries(self.keys[which], self.row_ids[which], self.marked[which])

    def with_row_ids(self, row_ids: np.ndarray) -> Entries:
        """Return the same entries under other numbers of shards, which have to rise as those did."""
        return Entries(self.keys, row_ids, self.marked)

    def marked_fresh(self, fresh: bool) -> Entries:
        """Return the same entries, all of them marked as in no file, or as in one."""
        return Entries(self.keys, self.row_ids, self.marked | _FRESH if fresh else self.lengths)


def sorted_entries(keys: np.ndarray, row_ids: np.ndarray, marked: np.ndarray) -> Entries:
    """Return entries of rows in any order, of which some may come more than once."""
    order = np.lexsort((row_ids, keys))
    keys, row_ids, marked = keys[order], row_ids[order], marked[order]
    # the first of each place has its smallest key; `unique` returns first occurrences
    _, firsts = np.unique(row_ids, return_index=True)
    if firsts.size < row_ids.size:
        kept = np.sort(firsts)
        keys, row_ids, marked = keys[kept], row_ids[kept], marked[kept]
    return Entries(keys, row_ids, marked)


def merged(ours: Entries, theirs: Entries, pure: bool = False) -> Entries:
    """Return the union of two sets of entries; where both have a row, the smaller key stays, and ours of equal ones.

    With `pure`, a row has one key wherever it comes from, which spares a sorted copy of all row ids.

    Where the caller keeps no reference to `ours`, its columns are freed one by one: beside the result it takes half as
    much memory again.
    """
    if not theirs.size or not ours.size:
        return ours if not theirs.size else theirs
    ours, theirs = _distinct(ours, theirs, pure)
    if not theirs.size:
        return ours
    # index of each of theirs in the result: behind our smaller keys, and behind those of theirs before it
    at = np.searchsorted(ours.keys, theirs.keys, side="right") + np.arange(theirs.size)
    is_theirs = np.zeros(ours.size + theirs.size, bool)
    is_theirs[at] = True
    is_ours = ~is_theirs
    left, columns = _columns(ours), []
    del ours
    for other in _columns(theirs):
        mine = left.pop(0)
        column = np.empty(is_ours.size, mine.dtype)
        column[is_ours], column[is_theirs] = mine, other
        del mine  # before the next column is made
        columns.append(column)
    _sort_ties(*columns)
    return Entries(*columns)


def _columns(entries: Entries) -> list[np.ndarray]:
    return [entries.keys, entries.row_ids, entries.marked]


def _distinct(ours: Entries, theirs: Entries, pure: bool) -> tuple[Entries, Entries]:
    """Return both without the rows that the other has with a smaller key, or that both have with one key."""
    # rows that are seen again have the key that they had: found without looking at all row ids
    at = np.minimum(np.searchsorted(ours.keys, theirs.keys, side="left"), ours.size - 1)
    is_tied = ours.keys[at] == theirs.keys
    is_new = ~is_tied | (ours.row_ids[at] != theirs.row_ids)
    theirs = theirs.at(is_new)
    # a key that other rows have, too: one of those may be the row itself
    if not theirs.size or (pure and not (is_tied & is_new).any()):
        return ours, theirs
    row_ids, order = np.sort(ours.row_ids), np.argsort(theirs.row_ids)
    wanted, shared = theirs.row_ids[order], np.empty(theirs.size, bool)
    # sorted on both sides: the search goes through memory once and not at random, ten times as fast
    shared[order] = row_ids[np.minimum(np.searchsorted(row_ids, wanted), row_ids.size - 1)] == wanted
    del row_ids, wanted
    if not shared.any():
        return ours, theirs
    # admitted with two weights: few, so they are looked up one by one
    numbers = np.flatnonzero(np.isin(ours.row_ids, theirs.row_ids[shared]))
    our_key = dict(zip(ours.row_ids[numbers].tolist(), ours.keys[numbers].tolist(), strict=True))
    pairs = zip(theirs.keys.tolist(), theirs.row_ids.tolist(), strict=True)
    wins = np.array([key < our_key.get(row_id, np.inf) for key, row_id in pairs])
    theirs = theirs.at(wins)
    lost = np.zeros(ours.size, bool)
    lost[numbers] = np.isin(ours.row_ids[numbers], theirs.row_ids)
    return ours.at(~lost) if lost.any() else ours, theirs


def _sort_ties(keys: np.ndarray, row_ids: np.ndarray, marked: np.ndarray) -> None:
    """Put entries with equal keys into the order of their row ids, in place."""
    equal = keys[1:] == keys[:-1]
    if not equal.any():
        return
    # keys (1, 2, 2, 3): equal (F, T, F), tied 1 and 2. Runs of tied ones keep their numbers among each other
    tied = np.flatnonzero(np.append(False, equal) | np.append(equal, False))
    order = tied[np.lexsort((row_ids[tied], keys[tied]))]
    row_ids[tied], marked[tied] = row_ids[order], marked[order]
