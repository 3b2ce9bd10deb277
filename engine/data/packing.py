"""Packing by concatenation: which stretch of a shard a row is, and where documents begin in it.

Row i of a shard holds the i-th stretch of `capacity` tokens; the last may be short. What is read depends on the
objective: tokens that have a successor (with it, so that every token but the shard's first follows another exactly
once), all tokens, or all but the ends of text. Rows never leave their shard. What is predicted is the objective's
business. Packing whole documents is in `engine.data.best_fit`, pairs in `engine.data.pairs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engine.data.dataset import Shard, TokenDataset

Reads = Literal["successors", "all", "text"]
"""What rows are made of: tokens with their successors, all tokens, or all but the ends of text."""


@dataclass(frozen=True)
class Row:
    """Tokens for one row.

    `tokens` (n,), n from 1 to the row's capacity, and `successors` (n,), the token behind each, or None where none is
    asked for; both may be views into the shard. `starts` (k,) int64, rising, from 1 to n - 1: positions at which
    another document (or part of one) begins; the row's first may have begun in an earlier row. `ends` (m,) int64:
    positions whose successor lies in another document.
    """

    tokens: np.ndarray
    successors: np.ndarray | None
    starts: np.ndarray
    ends: np.ndarray

    def documents(self) -> list[np.ndarray]:
        """The tokens, document by document."""
        return np.split(self.tokens, self.starts)

    def document_lengths(self, length: int) -> np.ndarray:
        """(documents,) int32 places of each in a row of `length`, padding last where there is any."""
        padding = [self.tokens.size] if self.tokens.size < length else []
        return np.diff(np.concatenate([[0], self.starts, padding, [length]])).astype(np.int32)


class Stretches(NamedTuple):
    """N rows at once. `tokens_NT` in the shards' type, the successor of each row's last token included where it is
    asked for, undefined behind `sizes_N` (int64); documents begin at (`rows`, `places`), places from 1 on."""

    tokens_NT: np.ndarray
    sizes_N: np.ndarray
    rows: np.ndarray
    places: np.ndarray


class Packing(Protocol):
    """A way to cut shards into rows."""

    name: str

    def count(self, shards: np.ndarray) -> np.ndarray:
        """(n,) int64 rows in each of the shards (n,). Raises `DataError` where offsets are damaged."""
        ...

    def row(self, shard: Shard, number: int, row: int) -> Row:
        """A row of a shard; `number` is the shard's."""
        ...


class Concatenation:
    """Consecutive stretches of `capacity` tokens."""

    name = "concatenate"

    def __init__(self, dataset: TokenDataset, capacity: int, reads: Reads) -> None:
        self.capacity, self.reads = capacity, reads
        tokens = np.array([shard.num_tokens for shard in dataset.index.shards], np.int64)
        documents = np.array([shard.num_documents for shard in dataset.index.shards], np.int64)
        self._counts = num_rows(tokens - documents if reads == "text" else tokens, capacity, reads)

    def count(self, shards: np.ndarray) -> np.ndarray:
        return self._counts[shards]

    def row(self, shard: Shard, number: int, row: int) -> Row:
        del number
        start = row * self.capacity
        return _text_row(shard, start, self.capacity) if self.reads == "text" else self._stretch(shard, start)

    def stretches(self, shards: Callable[[int], Shard], places_N2: np.ndarray, dtype: str) -> Stretches:
        """Rows (shard, row) read together, as many times faster as there are rows; none of the text alone.

        `shards` opens a shard by its number; `dtype` is that of the tokens.
        """
        assert self.reads != "text"
        width = self.capacity + (self.reads == "successors")
        tokens_NT, sizes_N = np.empty((len(places_N2), width), dtype), np.empty(len(places_N2), np.int64)
        rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in np.unique(places_N2[:, 0]).tolist():
            shard, mine = shards(number), np.flatnonzero(places_N2[:, 0] == number)
            starts = places_N2[mine, 1] * self.capacity
            sizes_N[mine] = sizes = np.minimum(width, shard.tokens.size - starts)
            is_whole = sizes == width
            if is_whole.any():
                step = shard.tokens.strides[0]
                windows = as_strided(
                    shard.tokens, (shard.tokens.size - width + 1, width), (step, step), writeable=False
                )
                tokens_NT[mine[is_whole]] = windows[starts[is_whole]]
            for row, start, size in zip(mine[~is_whole], starts[~is_whole], sizes[~is_whole], strict=True):
                tokens_NT[row, :size] = shard.tokens[start : start + size]
            firsts, lasts = np.searchsorted(shard.documents, (starts, starts + sizes - 1), side="right")
            counts = lasts - firsts
            which = np.arange(counts.sum()) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
            rows.append(np.repeat(mine, counts))
            places.append(shard.documents[which] - np.repeat(starts, counts))
        return Stretches(tokens_NT, sizes_N, np.concatenate(rows), np.concatenate(places))

    def _stretch(self, shard: Shard, start: int) -> Row:
        lookahead = self.reads == "successors"
        tokens = shard.tokens[start : start + self.capacity + lookahead]
        first, last = np.searchsorted(shard.documents, (start, start + tokens.size - 1), side="right")
        begins = shard.documents[first:last] - start
        if not lookahead:
            return Row(tokens, None, begins, begins - 1)
        assert tokens.size >= 2, "num_rows() counts no row without a target"
        return Row(tokens[:-1], tokens[1:], begins[begins < tokens.size - 1], begins - 1)


def _text_row(shard: Shard, start: int, capacity: int) -> Row:
    """`capacity` tokens from the `start`-th on, ends of text neither read nor counted."""
    firsts = shard.documents - np.arange(shard.documents.size)  # of each document, and the end
    end = min(start + capacity, int(firsts[-1]))
    one = int(np.searchsorted(firsts, start, side="right")) - 1
    other = int(np.searchsorted(firsts, end, side="left"))
    edges = np.clip(firsts[one : other + 1], start, end)
    parts = [shard.tokens[a + d : b + d] for d, a, b in zip(range(one, other), edges[:-1], edges[1:], strict=True)]
    inner = np.unique(edges[1:-1] - start)
    starts = inner[(inner > 0) & (inner < end - start)]
    return Row(np.concatenate(parts), None, starts, starts - 1)


def num_rows(num_tokens: np.ndarray, capacity: int, reads: Reads) -> np.ndarray:
    """Rows of shards of so many tokens (int64): for successors ceil((n - 1) / capacity), and as many for text, where
    a row of one token could not be corrupted; otherwise ceil(n / capacity)."""
    left = num_tokens.astype(np.int64) - (reads != "all")
    return np.maximum(0, -(-left // capacity))
