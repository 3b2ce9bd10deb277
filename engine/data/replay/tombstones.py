"""Tombstones: documents that must not be trained on again, by the content hash of their shard.

They are no part of a reservoir's state: whoever opens one hands them in as they are now, so that a state from before a
deletion does not bring a document back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Tombstones:
    """Deleted documents: content hash of a shard -> rising numbers of documents in it, int64."""

    documents: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, int]]) -> Tombstones:
        """Return the tombstones of (content hash, document) pairs, in any order and with repeats."""
        found: dict[str, set[int]] = {}
        for content_hash, document in pairs:
            found.setdefault(content_hash, set()).add(document)
        return cls({name: np.array(sorted(numbers), np.int64) for name, numbers in found.items()})

    def __bool__(self) -> bool:
        return bool(self.documents)

    def hit(self, content_hash: str, documents: np.ndarray) -> np.ndarray:
        """Return True for the documents (n,) of a shard that are deleted, (n,) bool."""
        deleted = self.documents.get(content_hash)
        return np.zeros(documents.size, bool) if deleted is None else np.isin(documents, deleted)
