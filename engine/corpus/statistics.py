"""Counts over the documents of a corpus; those of parts add up to the counts of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_COUNTS = ("documents", "empty_documents", "tokens", "text_bytes", "unknown_tokens")
_LATER = ("sentences", "exact_duplicates", "near_duplicates", "unspelt_bytes", "left_out_bytes")
"""Counts that older reports lack."""


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
    exact_duplicates: int = 0
    """Documents that were left out because an earlier one has the same text."""
    near_duplicates: int = 0
    """Documents that were left out because an earlier one is nearly the same."""
    unspelt_bytes: int = 0
    """Bytes of text that no token spells: unknown to the tokenizer, or dropped by it."""
    left_out_bytes: int = 0
    """Bytes among `unspelt_bytes` in documents without a token, which `text_bytes` does not count."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the power of two that their tokens reach: key k counts lengths from 2^k to 2^(k+1) - 1."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of text, ends of text not counted."""
        return self.text_bytes / max(1, self.tokens - self.documents)

    @property
    def unknown_rate(self) -> float:
        """Share of the tokens of text that are unknown."""
        return self.unknown_tokens / max(1, self.tokens - self.documents)

    @property
    def unspelt_rate(self) -> float:
        """Share of the bytes of text that no token spells."""
        return self.unspelt_bytes / max(1, self.text_bytes + self.left_out_bytes)

    def to_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS + _LATER}
        rates = {
            "bytes_per_token": round(self.bytes_per_token, 4),
            "unknown_rate": round(self.unknown_rate, 8),
            "unspelt_rate": round(self.unspelt_rate, 8),
        }
        return counts | rates | {"lengths": {str(power): self.lengths[power] for power in sorted(self.lengths)}}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Statistics:
        """Return the counts that `to_json` wrote. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError`."""
        lengths = Counter({int(power): int(count) for power, count in tree["lengths"].items()})
        counts = {name: int(tree[name]) for name in _COUNTS} | {name: int(tree.get(name, 0)) for name in _LATER}
        return cls(**counts, lengths=lengths)
