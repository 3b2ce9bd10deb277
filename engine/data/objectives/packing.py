"""Packing by concatenation: the tokens of a shard that make up a row, and the beginnings of documents in it.

Row i of a shard holds its tokens [i * capacity, (i + 1) * capacity); the last row may be short. What is read depends
on the objective: tokens that have a successor (with it, so that every token but the shard's first follows another
exactly once), all tokens, or all but the ends of text. Rows never leave their shard. What is predicted is the
objective's business. Packing whole documents is in `engine.data.objectives.best_fit`, pairs in
`engine.data.objectives.pairs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from engine.data.shards.dataset import Shard, TokenDataset

Reads = Literal["successors", "all", "text"]
"""Tokens that rows are made of: tokens with their successors, all tokens, or all but the ends of text."""


@dataclass(frozen=True)
class Row:
    """Tokens for one row.

    `tokens` (n,), n from 1 to the row's capacity, and `successors` (n,), the token after each, or None where none is
    asked for; both may be views of the shard. `starts` (k,) int64, rising, from 1 to n - 1: positions at which
    another document (or part of one) begins; the row's first may have begun in an earlier row. `ends` (m,) int64:
    positions whose successor lies in another document.
    `forgotten` (n,) bool: True where the token that is predicted (the successor, or else the token itself) is of a
    forgotten document; None where none is.
    """

    tokens: np.ndarray
    successors: np.ndarray | None
    starts: np.ndarray
    ends: np.ndarray
    forgotten: np.ndarray | None = None

    def documents(self) -> list[np.ndarray]:
        """Return the tokens, document by document."""
        return np.split(self.tokens, self.starts)

    def document_lengths(self, length: int) -> np.ndarray:
        """Return the positions of each document in a row of `length`, (documents,) int32, padding last if any."""
        # 5 tokens in a row of 8, documents that begin at 0 and 3: edges 0, 3, 5, 8, lengths 3, 2 and 3 (padding)
        padding = [self.tokens.size] if self.tokens.size < length else []
        return np.diff(np.concatenate([[0], self.starts, padding, [length]])).astype(np.int32)


class Stretches(NamedTuple):
    """N rows that were read at once: `sizes_N` (int64) tokens of each, the successor of its last one included where it
    is asked for; the rest of a row was not written. Documents begin at (`rows`, `positions`), positions from 1 on.
    `forgotten_NW` is True for tokens of forgotten documents; None where there is none."""

    sizes_N: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    forgotten_NW: np.ndarray | None


class Packing(Protocol):
    """A way to cut shards into rows."""

    name: str

    def count(self, shards: np.ndarray) -> np.ndarray:
        """Return the rows in each of the shards (n,), (n,) int64. Raises `DataError` where offsets are damaged."""
        ...

    def row(self, shard: Shard, number: int, row: int) -> Row:
        """Return a row of a shard; `number` is the shard's."""
        ...

    def rows_of(self, number: int, documents: np.ndarray) -> np.ndarray:
        """Return the rows of a shard that hold a token of its documents (n,), each once, (rows,) int64, rising."""
        ...

    def ranges(self, shard_rows_N2: np.ndarray) -> np.ndarray:
        """Return the tokens that rows (shard, row) are made of, (M, 3) int64: shard, first token, the one behind the
        last. Reads offsets at most. Raises `DataError` where these are damaged."""
        ...


class Concatenation:
    """Rows of `capacity` consecutive tokens."""

    name = "concatenate"

    def __init__(self, dataset: TokenDataset, capacity: int, reads: Reads) -> None:
        self.capacity, self.reads, self._dataset = capacity, reads, dataset
        tokens = np.array([shard.num_tokens for shard in dataset.index.shards], np.int64)
        documents = np.array([shard.num_documents for shard in dataset.index.shards], np.int64)
        self._tokens, self._boundaries = tokens, _Boundaries(tokens)
        self._counts = num_rows(tokens - documents if reads == "text" else tokens, capacity, reads)

    def count(self, shards: np.ndarray) -> np.ndarray:
        return self._counts[shards]

    def row(self, shard: Shard, number: int, row: int) -> Row:
        del number
        start = row * self.capacity
        return _text_row(shard, start, self.capacity) if self.reads == "text" else self._stretch(shard, start)

    def rows_of(self, number: int, documents: np.ndarray) -> np.ndarray:
        bounds, _ = self._dataset.offsets(number)
        firsts, lasts = bounds[documents], bounds[documents + 1] - 1
        if self.reads == "text":
            # without its end of text, nor those of the documents before it; a document without text has last < first
            firsts, lasts = firsts - documents, lasts - documents - 1
        # with capacity 4, token 8 is also the last successor of row 1
        begins = np.maximum(firsts - (self.reads == "successors"), 0) // self.capacity
        ends = np.minimum(lasts // self.capacity, self._counts[number] - 1) + 1
        rows = [np.arange(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))

    def ranges(self, shard_rows_N2: np.ndarray) -> np.ndarray:
        numbers_N, firsts_N = shard_rows_N2[:, 0], shard_rows_N2[:, 1] * self.capacity
        if self.reads != "text":
            return np.stack(
                [numbers_N, firsts_N, np.minimum(firsts_N + self.capacity, self._tokens[numbers_N])], axis=1
            )
        found_N3 = np.stack([numbers_N, firsts_N, firsts_N + self.capacity], axis=1)
        for number in np.unique(numbers_N).tolist():
            mine, documents = np.flatnonzero(numbers_N == number), self._dataset.offsets(number)[0]
            # as in `_text_row`: a token of document d has d ends of text before it that are not counted
            text = documents - np.arange(documents.size)
            last_N = np.minimum(found_N3[mine, 2], text[-1]) - 1
            found_N3[mine, 1] += np.searchsorted(text, found_N3[mine, 1], side="right") - 1
            found_N3[mine, 2] = last_N + np.searchsorted(text, last_N, side="right")
        return found_N3

    def stretches(self, shards: Callable[[int], Shard], shard_rows_N2: np.ndarray, into_NW: np.ndarray) -> Stretches:
        """Read rows (shard, row) together into an array of any integers, as many times faster as there are rows; none
        of the text alone.

        W is the capacity, and one more with successors. `shards` opens a shard by its number.
        """
        assert self.reads != "text"
        numbers_N, starts_N = shard_rows_N2[:, 0], shard_rows_N2[:, 1] * self.capacity
        firsts_N = self._boundaries.firsts[numbers_N]
        # by shard and by position in it: memory is read in one direction
        order = np.argsort(firsts_N + starts_N)
        sizes_N = np.minimum(into_NW.shape[1], self._tokens[numbers_N] - starts_N)  # W, less in the last row of a shard
        opened = _copy_rows(shards, numbers_N, starts_N, sizes_N, into_NW, order)
        forgotten_NW = _forgotten(opened, numbers_N, starts_N, into_NW.shape[1])
        # from a position in the shard to one among the tokens of all shards
        starts_N += firsts_N
        rows, begins = self._boundaries.inside(opened, starts_N, starts_N + sizes_N - 1, order)
        return Stretches(sizes_N, rows, begins - starts_N[rows], forgotten_NW)

    def _stretch(self, shard: Shard, start: int) -> Row:
        lookahead = self.reads == "successors"
        tokens = shard.tokens[start : start + self.capacity + lookahead]
        # `right`: a document that begins with the row itself is no boundary inside of it
        first, last = np.searchsorted(shard.documents, (start, start + tokens.size - 1), side="right")
        begins = shard.documents[first:last] - start
        forgotten = forgotten_at(shard, np.arange(start + lookahead, start + tokens.size))
        if not lookahead:
            return Row(tokens, None, begins, begins - 1, forgotten)
        assert tokens.size >= 2, "num_rows() counts no row without a target"
        # a document that begins with the last successor ends a prediction, but begins behind the row's own tokens
        return Row(tokens[:-1], tokens[1:], begins[begins < tokens.size - 1], begins - 1, forgotten)


def forgotten_at(shard: Shard, positions: np.ndarray) -> np.ndarray | None:
    """Return True for the positions (n,) of a shard that are in forgotten documents; None where it has none."""
    return shard.is_forgotten(positions) if len(shard.forgotten) else None


def _forgotten(opened: dict[int, Shard], numbers_N: np.ndarray, starts_N: np.ndarray, width: int) -> np.ndarray | None:
    """Return True for the tokens in forgotten documents, (N, W) bool; None where none of the shards has any."""
    found_NW = None
    for number, shard in opened.items():
        if len(shard.forgotten):
            mine = np.flatnonzero(numbers_N == number)
            found_NW = np.zeros((numbers_N.size, width), bool) if found_NW is None else found_NW
            found_NW[mine] = shard.is_forgotten(starts_N[mine][:, None] + np.arange(width))
    return found_NW


def _copy_rows(
    shards: Callable[[int], Shard],
    numbers_N: np.ndarray,
    starts_N: np.ndarray,
    sizes_N: np.ndarray,
    into_NW: np.ndarray,
    order: np.ndarray,
) -> dict[int, Shard]:
    """Copy tokens into rows, those of a shard in one call except for short ones, and return the opened shards.

    `order` has the rows of each shard together.
    """
    width, opened = into_NW.shape[1], {}
    # rows by shard, and the indices at which the shard changes: shards (5, 2, 5) have order (1, 0, 2), cuts (0, 1, 3)
    cuts = [0, *(np.flatnonzero(np.diff(numbers_N[order])) + 1).tolist(), order.size]
    short = sizes_N < width
    has_short = bool(short.any())
    for first, end in itertools.pairwise(cuts if order.size else []):
        mine, number = order[first:end], int(numbers_N[order[first]])
        tokens = (opened.setdefault(number, shards(number))).tokens
        if has_short:
            for row in mine[short[mine]].tolist():
                into_NW[row, : sizes_N[row]] = tokens[starts_N[row] : starts_N[row] + sizes_N[row]]
            mine = mine[~short[mine]]
        if mine.size:
            # a row from every position on, as a view: 10 tokens, width 4: (7, 4), row i is tokens i to i + 3. Made by
            # hand, since as_strided takes longer than the copy
            shape, step = (tokens.size - width + 1, width), tokens.strides[0]
            into_NW[mine] = np.ndarray(shape, tokens.dtype, tokens, 0, (step, step))[starts_N[mine]]
    return opened


class _Boundaries:
    """Beginnings of documents in the shards that are in use, counted over the tokens of all shards of a data set.

    So one search serves all rows of a batch, in however many shards they are.
    """

    def __init__(self, num_tokens: np.ndarray) -> None:
        self.firsts = np.cumsum(num_tokens) - num_tokens
        """(shards,) int64: tokens before each shard."""
        self._known: dict[int, np.ndarray] = {}
        self._used: set[int] = set()
        self._all = np.empty(0, np.int64)

    def inside(
        self, shards: dict[int, Shard], starts_N: np.ndarray, lasts_N: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Return (row, position) of the documents that begin after `starts_N` and up to `lasts_N`, in these shards.

        `order` has the rows by rising start.
        """
        if not self._known.keys() >= shards.keys():
            self._learn(shards)
        self._used.update(shards)
        # example: boundaries [0, 5, 9, 20], a row of tokens 3 to 10: those in (3, 10] are entries 1 and 2 (5 and 9)
        found_2N = np.empty((2, starts_N.size), np.int64)
        # rising values are looked up several times as fast as the same in any order
        found_2N[:, order] = np.searchsorted(self._all, np.stack((starts_N[order], lasts_N[order])), side="right")
        firsts_N, ends_N = found_2N
        counts_N = ends_N - firsts_N
        ends = np.cumsum(counts_N)
        # the ranges [first, end) of all rows one behind the other: counts [2, 1] from firsts [1, 3] are [1, 2, 3]
        which = np.arange(ends[-1] if ends.size else 0) + np.repeat(firsts_N - ends + counts_N, counts_N)
        return np.repeat(np.arange(counts_N.size), counts_N), self._all[which]

    def _learn(self, shards: dict[int, Shard]) -> None:
        """Take in new shards, and forget those that were not used since it last did."""
        known = {number: found for number, found in self._known.items() if number in self._used}
        known |= {number: shard.documents + self.firsts[number] for number, shard in shards.items()}
        self._known, self._used = known, set()
        # by shard number, so that the whole is sorted, as searchsorted needs it
        self._all = np.concatenate([known[number] for number in sorted(known)])


def _text_row(shard: Shard, start: int, capacity: int) -> Row:
    """Return the row of `capacity` tokens from the `start`-th on, ends of text neither read nor counted."""
    # first tokens of the documents, and the end, where no end of text is counted: lengths 3, 2 give [0, 2, 3]
    firsts = shard.documents - np.arange(shard.documents.size)
    end = min(start + capacity, int(firsts[-1]))
    one = int(np.searchsorted(firsts, start, side="right")) - 1
    other = int(np.searchsorted(firsts, end, side="left"))
    edges = np.clip(firsts[one : other + 1], start, end)
    parts = [shard.tokens[a + d : b + d] for d, a, b in zip(range(one, other), edges[:-1], edges[1:], strict=True)]
    # each token's document d has d ends of text before it: position in the text + d is the position in the shard
    before = np.repeat(np.arange(one, other), np.diff(edges))
    forgotten = forgotten_at(shard, np.arange(edges[0], edges[-1]) + before)
    # unique: a document without text begins where the next one does
    inner = np.unique(edges[1:-1] - start)
    starts = inner[(inner > 0) & (inner < end - start)]
    return Row(np.concatenate(parts), None, starts, starts - 1, forgotten)


def num_rows(num_tokens: np.ndarray, capacity: int, reads: Reads) -> np.ndarray:
    """Return the number of rows of shards of so many tokens (int64).

    For successors ceil((n - 1) / capacity), and as many for text, where a row of one token could not be corrupted;
    otherwise ceil(n / capacity).
    """
    # a shard's last token has no successor, so one token less can be read
    left = num_tokens.astype(np.int64) - (reads != "all")
    return np.maximum(0, -(-left // capacity))
