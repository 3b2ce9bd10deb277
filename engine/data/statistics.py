"""What a corpus is made of, counted while it is tokenised; counts of parts add up to the counts of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Statistics:
    """Counts over documents. Tokens include each document's end-of-text; bytes are those of the UTF-8 text."""

    documents: int = 0
    empty_documents: int = 0
    """Documents without a token, which are left out."""
    tokens: int = 0
    text_bytes: int = 0
    unknown_tokens: int = 0
    sentences: int = 0
    """0 where none were asked for."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the power of two that their tokens reach: key k counts lengths from 2^k to 2^(k+1) - 1."""

    def add(self, ids: np.ndarray, text_bytes: int, unknown_id: int | None, sentences: int = 0) -> None:
        """Counts one document of `ids` (n,), its end-of-text included, n >= 2."""
        self.documents += 1
        self.tokens += ids.size
        self.text_bytes += text_bytes
        self.sentences += sentences
        self.unknown_tokens += 0 if unknown_id is None else int(np.count_nonzero(ids == unknown_id))
        self.lengths[int(ids.size).bit_length() - 1] += 1

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of text, ends of text not counted."""
        return self.text_bytes / max(1, self.tokens - self.documents)

    @property
    def unknown_rate(self) -> float:
        """Share of the tokens of text that are unknown."""
        return self.unknown_tokens / max(1, self.tokens - self.documents)

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "bytes_per_token": round(self.bytes_per_token, 4),
            "unknown_tokens": self.unknown_tokens,
            "unknown_rate": round(self.unknown_rate, 8),
            "sentences": self.sentences,
            "lengths": {str(power): self.lengths[power] for power in sorted(self.lengths)},
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Statistics:
        """The counts that `to_json` wrote. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError`."""
        names = ("documents", "empty_documents", "tokens", "text_bytes", "unknown_tokens")
        lengths = Counter({int(power): int(count) for power, count in tree["lengths"].items()})
        counts = {name: int(tree[name]) for name in names}
        return cls(**counts, sentences=int(tree.get("sentences", 0)), lengths=lengths)
