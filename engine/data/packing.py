"""Packing by concatenation: which stretch of a shard a row is, and where documents begin in it.

With T the sequence length, row i of a shard of n tokens reads the T + 1 tokens from i * T on: the first T are
inputs, the last T their successors. There are ceil((n - 1) / T) rows and the last may be short, so every token
but a shard's first follows an input exactly once. Rows never leave their shard. Whether a document's first token
may be predicted from the document before is the objective's business (`engine.data.objectives`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.data.dataset import Shard, TokenDataset
from engine.errors import DataError


@dataclass(frozen=True)
class Row:
    """A stretch of a shard for one row of T inputs.

    `tokens` (inputs + 1,), a view into the shard, with 1 <= inputs <= T: fewer than T in a shard's last row, which
    is then padded. `starts` (k,) int64, rising, from 1 to inputs: positions in `tokens` at which another document
    begins (the row's first document may have begun in an earlier row). `length` is T.
    """

    tokens: np.ndarray
    starts: np.ndarray
    length: int

    @property
    def num_inputs(self) -> int:
        """Inputs that are tokens of the shard, not padding."""
        return self.tokens.size - 1

    def segments(self) -> np.ndarray:
        """(T,) int32: number of the document within the row, from 0; padding is a document of its own, the last."""
        marks_T = np.zeros(self.length, np.int32)
        marks_T[self.starts[self.starts < self.num_inputs]] = 1
        if self.num_inputs < self.length:
            marks_T[self.num_inputs] = 1
        return np.cumsum(marks_T, dtype=np.int32)

    def documents(self) -> list[np.ndarray]:
        """The inputs, document by document, padding left out."""
        inner = self.starts[self.starts < self.num_inputs]
        return np.split(self.tokens[:-1], inner)

    def document_lengths(self) -> np.ndarray:
        """(documents,) int32: inputs of each segment, padding last where there is any; they add up to T."""
        inner = self.starts[self.starts < self.num_inputs]
        padding = [self.num_inputs] if self.num_inputs < self.length else []
        return np.diff(np.concatenate([[0], inner, padding, [self.length]])).astype(np.int32)


def num_rows(num_tokens: np.ndarray, sequence_length: int) -> np.ndarray:
    """Rows of shards of so many tokens, as int64: ceil((n - 1) / T), and none for n below 2."""
    return np.maximum(0, -((1 - num_tokens.astype(np.int64)) // sequence_length))


def rows_per_shard(dataset: TokenDataset, sequence_length: int) -> np.ndarray:
    """(shards,) int64 samples in each shard. Raises `DataError` where there is none at all."""
    tokens = np.array([shard.num_tokens for shard in dataset.index.shards], np.int64)
    rows = num_rows(tokens, sequence_length)
    if not rows.sum():
        raise DataError(
            f"the data set {dataset.folder} holds no sample: {dataset.index.num_documents} documents, "
            f"{dataset.index.num_tokens} tokens",
            "at least one document",
            "prepare more text (or a larger --validation-fraction, where this is the held-out part)",
        )
    return rows


def pack(shard: Shard, row: int, sequence_length: int) -> Row:
    """Row `row` of a shard."""
    start = row * sequence_length
    tokens = shard.tokens[start : start + sequence_length + 1]
    assert tokens.size >= 2, "num_rows() counts no row without a target"
    first, last = np.searchsorted(shard.documents, [start, start + tokens.size - 1], side="right")
    return Row(tokens, shard.documents[first:last] - start, sequence_length)
