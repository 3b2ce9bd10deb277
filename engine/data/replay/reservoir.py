"""The reservoir: a bounded sample of the documents that a run has trained on, by domain; an index and never a copy.

Rows are admitted with keys that are pure functions of (seed, shard's content hash, row, weight), and the smallest keys
of each domain stay (`keys`, `entries`). Invariant: the state is a function of the set of rows that were admitted and
of the domains' sizes, whatever the order, the split over ranks and repeats after a crash. The table of shards is
sorted by hash, so row ids sort alike everywhere. Files are in `engine.data.replay.files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.data.replay.entries import Entries, merged, sorted_entries
from engine.data.replay.generation import Domain, Generation
from engine.data.replay.keys import row_keys
from engine.data.replay.quotas import bounds, ideal_rows, quotas, shares
from engine.data.replay.rows import (
    INSIDE,
    MOST_SHARDS,
    MOST_SPAN_TOKENS,
    SHARD_SHIFT,
    SPAN_TOKENS,
    Rows,
    documents_of,
    shards_of,
)
from engine.data.shards.document_weights import LARGEST_WEIGHT, LEAST_WEIGHT, are_within_bounds
from engine.data.shards.tombstones import NO_TOMBSTONES, Tombstones
from engine.errors import DataError

_FEWEST_WAITING, _MOST_WAITING = 1 << 14, 1 << 18
"""Rows that wait at least, and at most, before they are merged: an eighth of what is there, so that merging costs the
same per row however large the reservoir is."""
_CHUNK = 1 << 18
"""Rows that are keyed at once."""
_MERGED = 1 << 18
"""Entries of another reservoir that are merged at once."""


@dataclass(frozen=True)
class Settings:
    """Settings that a reservoir's rows and keys depend on; equal in all reservoirs that are merged."""

    capacity: int
    """Most rows of all domains together."""
    seed: int
    quota: str = "proportional"
    """One of `quotas.KINDS`."""
    fixed: Mapping[str, float] | None = None
    """Shares by domain, for the quota `fixed`."""
    span_tokens: int = SPAN_TOKENS
    """Tokens of a row at most."""
    pure: bool = True
    """True where a row always comes with the same weight, so that its key is the same, too."""

    def __post_init__(self) -> None:
        assert self.capacity >= 0
        assert 1 <= self.span_tokens <= MOST_SPAN_TOKENS


class Reservoir:
    """The rows with the smallest keys of each domain."""

    def __init__(self, settings: Settings, tombstones: Tombstones = NO_TOMBSTONES) -> None:
        """Begin empty; rows of deleted documents are never taken in."""
        self.settings, self.tombstones = settings, tombstones
        self.shards: tuple[str, ...] = ()
        """Content hashes, rising; a place has a number of this table."""
        self.sizes: dict[str, dict[str, int]] = {}
        """Tokens of each domain's data sets, by domain and fingerprint."""
        self.entries: dict[str, Entries] = {}
        """By domain; without the rows that wait to be merged."""
        self._limits: dict[str, float] = {}
        """Largest key that may still enter a domain. Bounds only fall while rows come, and so do limits."""
        self._inherited: dict[str, float] = {}
        """Those of the reservoir that this one will be merged into."""
        self._waiting: list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = 0

    def add_domain(self, domain: str, fingerprint: str, num_tokens: int) -> None:
        """Make a domain known, or a further data set of it; quotas depend on the tokens of all of them."""
        # with the quotas as they were: what is admitted from here on is judged by the new ones
        self.settle()
        self.sizes.setdefault(domain, {})[fingerprint] = num_tokens
        self.entries.setdefault(domain, Entries.none())
        self._cut()

    def empty(self) -> Reservoir:
        """Return a reservoir without rows that takes in what may still enter this one; merge it into this one."""
        self.settle()
        found = Reservoir(self.settings, self.tombstones)
        found.sizes = {domain: dict(sizes) for domain, sizes in self.sizes.items()}
        found.entries = {domain: Entries.none() for domain in self.entries}
        found._inherited = dict(self._limits)
        found._cut()
        return found

    def admit(self, domain: str, content_hash: str, rows: Rows, weights: np.ndarray | None = None) -> None:
        """Take in rows of a shard; `weights` (n,) are above 0, and None is 1 for all.

        A row with twice the weight is twice as likely to be the next that is chosen. Rows that the reservoir has
        change nothing.

        Raises:
            DataError: a weight is out of bounds.
        """
        assert domain in self.sizes, f"{domain} was not added"
        if weights is not None:
            check_weights(weights, content_hash)
        for start in range(0, rows.inside.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            some = None if weights is None else weights[chunk]
            self._admit(domain, content_hash, rows.inside[chunk], rows.lengths[chunk], some)

    def merge(self, other: Reservoir) -> None:
        """Take in the rows of another reservoir with the same settings, which stays as it is."""
        assert other.settings == self.settings
        self.settle()
        other.settle()
        for domain, sizes in other.sizes.items():
            for fingerprint, num_tokens in sizes.items():
                self.add_domain(domain, fingerprint, num_tokens)
        self._take(other.shards, {name: found.marked_fresh(True) for name, found in other.entries.items()})

    def shrink(self, capacity: int) -> None:
        """Lower the capacity: of each domain the first rows stay."""
        assert capacity <= self.settings.capacity
        self.settle()
        self.settings = replace(self.settings, capacity=capacity)
        self._cut()

    def drop(self, tombstones: Tombstones) -> int:
        """Drop the rows of deleted documents, now and from now on; return how many went."""
        self.settle()
        self.tombstones, before = tombstones, self.num_rows
        for domain, found in self.entries.items():
            self.entries[domain] = self._alive(self.shards, found)
        return before - self.num_rows

    @property
    def num_rows(self) -> int:
        """Rows of all domains, without those that wait to be merged."""
        return sum(found.size for found in self.entries.values())

    @property
    def has_fresh(self) -> bool:
        """True where some entry is in no file yet."""
        return any(bool(found.is_fresh.any()) for found in self.entries.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries in memory."""
        columns = [(found.keys, found.row_ids, found.marked) for found in self.entries.values()]
        return sum(column.nbytes for entries in columns for column in entries)

    def freeze(self) -> Generation:
        """Return what is replayed from now on: the rows within the domains' quotas, as they are now."""
        self.settle()
        given = quotas(self.settings.capacity, self._shares(), self._counts())
        domains = {
            name: Domain(found.row_ids[: given[name]], found.lengths[: given[name]])
            for name, found in sorted(self.entries.items())
        }
        return Generation.of(self.shards, domains, self.settings.span_tokens)

    def mark_written(self) -> None:
        """Count all entries as written to a file (`engine.data.replay.files`)."""
        self.settle()
        self.entries = {name: found.marked_fresh(False) for name, found in self.entries.items()}

    def settle(self) -> None:
        """Merge the rows that wait; afterwards the state is final until more are admitted."""
        if not self._waiting:
            return
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        table = tuple(sorted({content_hash for _, content_hash, *_ in waiting}))
        numbers = {content_hash: np.uint64(number) for number, content_hash in enumerate(table)}
        found = {}
        for domain in {item[0] for item in waiting}:
            mine = [item[1:] for item in waiting if item[0] == domain]
            row_ids = [inside | numbers[content_hash] << SHARD_SHIFT for content_hash, _, inside, _ in mine]
            keys, lengths = [item[1] for item in mine], [item[3] for item in mine]
            entries = sorted_entries(np.concatenate(keys), np.concatenate(row_ids), np.concatenate(lengths))
            found[domain] = entries.marked_fresh(True)
        del waiting
        self._take(table, found)

    def _admit(
        self, domain: str, content_hash: str, inside: np.ndarray, lengths: np.ndarray, weights: np.ndarray | None
    ) -> None:
        keys = row_keys(self.settings.seed, content_hash, inside, weights)
        # bounds never rise while rows come, so a key behind the last one of a full domain can be left out at once
        kept = keys <= self._limits[domain]
        kept &= lengths > 0
        if len(gone := self.tombstones.of(content_hash)):
            kept &= ~np.isin(documents_of(inside), gone)
        if not kept.any():
            return
        self._waiting.append((domain, content_hash, keys[kept], inside[kept], lengths[kept]))
        self._num_waiting += int(kept.sum())
        if self._num_waiting >= min(_MOST_WAITING, max(_FEWEST_WAITING, self.num_rows // 8)):
            self.settle()

    def _take(self, table: tuple[str, ...], found: Mapping[str, Entries]) -> None:
        """Merge entries whose row ids have numbers of another table."""
        joined = self.shards if set(table) <= set(self.shards) else tuple(sorted({*self.shards, *table}))
        if len(joined) > MOST_SHARDS:
            raise DataError(
                f"the reservoir has rows of {len(joined):,} shards",
                f"{MOST_SHARDS:,} shards at most",
                "prepare the data with larger shards (--shard-bytes)",
            )
        if joined != self.shards:
            ours = {name: renumbered(entries, self.shards, joined) for name, entries in self.entries.items()}
            self.entries, self.shards = ours, joined
        for name, entries in found.items():
            alive = self._alive(table, entries)
            # the smallest keys first: once those behind them cannot enter any more, the rest need no look
            for start in range(0, alive.size, _MERGED):
                part = alive.part(start, start + _MERGED)
                if part.keys[0] > self._limits[name]:
                    break
                # popped, so that the columns can be freed while they are merged
                self.entries[name] = merged(self.entries.pop(name), renumbered(part, table, joined), self.settings.pure)
                self._cut()

    def _alive(self, table: tuple[str, ...], entries: Entries) -> Entries:
        """Return the entries without those of deleted documents."""
        if not set(table) & set(self.tombstones.shards):
            return entries
        gone = self.tombstones.contains(table, shards_of(entries.row_ids), documents_of(entries.row_ids))
        return entries.at(~gone) if gone.any() else entries

    def _cut(self) -> None:
        """Drop the rows that no quota can want any more, and see which keys can still enter."""
        counted = self.settings.capacity, self._shares(), self._counts()
        most, ideals = bounds(*counted), ideal_rows(*counted)
        for name in list(self.entries):
            self.entries[name] = found = self.entries.pop(name).first(most[name])
            ideal, limit = ideals[name], self._inherited.get(name, np.inf)
            if ideal is not None and found.size > ideal:
                limit = min(limit, float(found.keys[-1]))
            # a domain without a share takes nothing in; keys are 0 or above
            self._limits[name] = -1.0 if ideal == 0 else limit

    def _counts(self) -> dict[str, int]:
        return {name: found.size for name, found in self.entries.items()}

    def _shares(self) -> dict[str, int]:
        sizes = {name: sum(self.sizes[name].values()) for name in sorted(self.sizes)}
        return shares(self.settings.quota, sizes, self.settings.fixed)


def renumbered(entries: Entries, table: tuple[str, ...], joined: tuple[str, ...]) -> Entries:
    """Return entries under the numbers of a table that has the shards of theirs and more; both are sorted."""
    if table == joined or not entries.size:
        return entries
    numbers = {content_hash: number for number, content_hash in enumerate(joined)}
    news = np.array([numbers[content_hash] for content_hash in table], np.uint64) << SHARD_SHIFT
    # rising tables: the new numbers rise as the old ones did, and so do row ids
    row_ids = news[(entries.row_ids >> SHARD_SHIFT).astype(np.int32)]
    row_ids |= entries.row_ids & INSIDE
    return entries.with_row_ids(row_ids)


def check_weights(weights: np.ndarray, content_hash: str) -> None:
    """Raise `DataError` for a weight that is no number, or out of bounds."""
    wrong = ~are_within_bounds(weights)
    if wrong.any():
        raise DataError(
            f"a row of shard {content_hash} has weight {weights[wrong][0]}",
            f"weights from {LEAST_WEIGHT} to {LARGEST_WEIGHT}",
            "mend the column of the shard that the weights are read from",
        )


def united(parts: Iterable[Reservoir]) -> Reservoir:
    """Return one reservoir with the rows of one or more, which stay as they are."""
    first, *others = parts
    found = Reservoir(first.settings, first.tombstones)
    for part in (first, *others):
        found.merge(part)
    return found
