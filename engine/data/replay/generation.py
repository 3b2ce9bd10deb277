"""A generation: the rows of a reservoir frozen at a moment, which a run stage replays; its hash names it.

Rows stand in the order of their keys, domain by domain. A generation does not change: rows that are admitted meanwhile
are of the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from engine.data.replay.rows import INSIDE, shards_of, used_shards
from engine.errors import DataError
from engine.logs import logger

if TYPE_CHECKING:
    from engine.data.replay.pinned import PinnedRows

MOST_STALE = 0.05
"""Largest share of the rows whose shards may be missing or changed, where nothing else is said."""
_log = logger(__name__)


@dataclass(frozen=True)
class Domain:
    """The rows of one domain by rising key: `row_ids` (n,) uint64 and `lengths` (n,) uint16 in tokens."""

    row_ids: np.ndarray
    lengths: np.ndarray

    @property
    def size(self) -> int:
        return self.row_ids.size

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


@dataclass(frozen=True)
class Generation:
    """Rows by domain, and the table of shards (content hashes, rising) that row ids have numbers of."""

    shards: tuple[str, ...]
    domains: Mapping[str, Domain]
    span_tokens: int
    pinned: PinnedRows | None = field(default=None, compare=False)
    """Copies of rows, for those whose shards are gone; None where there are none."""

    @classmethod
    def of(cls, table: tuple[str, ...], domains: Mapping[str, Domain], span_tokens: int) -> Generation:
        """Return a generation whose table has no other shards than those of its rows."""
        shards, columns = used_shards(table, [domain.row_ids for domain in domains.values()])
        found = {
            name: Domain(row_ids, domain.lengths)
            for (name, domain), row_ids in zip(domains.items(), columns, strict=True)
        }
        return cls(shards, found, span_tokens)

    @property
    def num_rows(self) -> int:
        return sum(domain.size for domain in self.domains.values())

    @property
    def num_tokens(self) -> int:
        return sum(domain.num_tokens for domain in self.domains.values())

    @cached_property
    def hash(self) -> str:
        """Hash of all rows in their order, as 32 hex digits."""
        digest = hashlib.sha256(json.dumps([list(self.shards), list(self.domains), self.span_tokens]).encode())
        for domain in self.domains.values():
            digest.update(len(domain.row_ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(domain.row_ids, "<u8").data)
            digest.update(np.ascontiguousarray(domain.lengths, "<u2").data)
        return digest.hexdigest()[:32]

    def without_stale(self, known: Collection[str], most_stale: float = MOST_STALE) -> Generation:
        """Return the rows whose shards are among the `known` content hashes, or that are pinned; the others are counted
        and logged.

        Raises:
            DataError: more than `most_stale` of the rows are lost.
        """
        missing = [number for number, content_hash in enumerate(self.shards) if content_hash not in known]
        if not missing:
            return self
        kept = {name: self._is_there(domain, missing) for name, domain in self.domains.items()}
        num_stale = self.num_rows - sum(int(which.sum()) for which in kept.values())
        if not num_stale:
            return self
        stale = np.unique(np.concatenate([shards_of(d.row_ids[~kept[name]]) for name, d in self.domains.items()]))
        named = ", ".join(self.shards[number] for number in stale[:3].tolist()) + (", ..." if len(stale) > 3 else "")
        if num_stale > most_stale * self.num_rows:
            raise DataError(
                f"{num_stale:,} of the {self.num_rows:,} rows to replay are in {len(stale):,} shards that are missing "
                f"or have changed ({named})",
                f"{most_stale:.0%} of the rows at most",
                "bring the shards back, or name the folder that has them now among the run's data",
            )
        _log.warning(
            "%d of %d rows are not replayed: their %d shards are missing or have changed (%s)",
            num_stale,
            self.num_rows,
            len(stale),
            named,
        )
        domains = {
            name: Domain(domain.row_ids[kept[name]], domain.lengths[kept[name]])
            for name, domain in self.domains.items()
        }
        return replace(Generation.of(self.shards, domains, self.span_tokens), pinned=self.pinned)

    def _is_there(self, domain: Domain, missing: list[int]) -> np.ndarray:
        """Return True for the rows that are in no missing shard, or pinned, (n,) bool."""
        shards = shards_of(domain.row_ids)
        found = ~np.isin(shards, missing)
        for number in missing if self.pinned is not None else ():
            mine = np.flatnonzero(shards == number)
            assert self.pinned is not None
            found[mine] = self.pinned.has(self.shards[number], domain.row_ids[mine] & INSIDE)
        return found
