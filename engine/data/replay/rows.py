"""Rows of a reservoir: documents, or fixed spans of long ones, in shards that are named by their content.

A document of n tokens has ceil(n / span_tokens) rows, of `span_tokens` tokens each but for the last. So a row follows
from the document's bounds alone, whatever the packing and the sequence length of the run that has trained on it. In
memory and in files a row is named by its *row id*: one uint64 of the shard's number in a table (20 bits), the document
in the shard (28 bits) and the span in the document (16 bits), so that row ids sort by shard, document and span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SPAN_TOKENS = 2048
"""Tokens of a row at most, where nothing else is said."""
MOST_SPAN_TOKENS = 2**15 - 1
"""Largest `span_tokens`: lengths take 15 bits."""
DOCUMENT_BITS, SPAN_BITS = 28, 16
SHARD_SHIFT = np.uint64(DOCUMENT_BITS + SPAN_BITS)
MOST_SHARDS = 2 ** (64 - DOCUMENT_BITS - SPAN_BITS)
"""Most shards that one table names."""
MOST_SPANS = 2**SPAN_BITS
"""Most rows of one document; what lies behind them is not admitted."""
INSIDE = np.uint64(2 ** (DOCUMENT_BITS + SPAN_BITS) - 1)
"""Bits of a row id that say which row of its shard it is."""


class Rows(NamedTuple):
    """Rows of one shard: `inside` (n,) uint64, document and span as the low bits of a row id; `lengths` (n,) uint16
    tokens of each."""

    inside: np.ndarray
    lengths: np.ndarray

    @property
    def documents(self) -> np.ndarray:
        """Documents of the rows, (n,) int64."""
        return documents_of(self.inside)


def documents_of(row_ids: np.ndarray) -> np.ndarray:
    """Return the documents of row ids (n,), (n,) int64."""
    return ((row_ids & INSIDE) >> np.uint64(SPAN_BITS)).astype(np.int64)


def spans_of(row_ids: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows in their documents, (n,) int64."""
    return (row_ids & np.uint64(MOST_SPANS - 1)).astype(np.int64)


def shards_of(row_ids: np.ndarray) -> np.ndarray:
    """Return the numbers of the shards of row ids in their table, (n,) int32."""
    return (row_ids >> SHARD_SHIFT).astype(np.int32)


def rows_of(documents: np.ndarray, offsets: np.ndarray, span_tokens: int) -> Rows:
    """Return all rows of some documents (n,), each named once, of a shard with these offsets (documents + 1,)."""
    sizes = offsets[documents + 1] - offsets[documents]
    counts = np.minimum(-(-sizes // span_tokens), MOST_SPANS)
    # documents 4 and 7 of 5 and 2 tokens, spans of 3: counts (2, 1), documents (4, 4, 7), spans (0, 1, 0)
    which = np.repeat(np.arange(documents.size), counts)
    spans = np.arange(which.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return _rows(documents[which], spans, np.minimum(span_tokens, sizes[which] - spans * span_tokens))


def rows_in(starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray, span_tokens: int) -> Rows:
    """Return the rows that ranges of tokens [start, end) of a shard touch, each once, in their order.

    `starts` and `ends` are (n,) with start < end; the ranges may overlap and cross the bounds of documents.
    """
    covered = _union(starts, ends)
    # (ranges, 2): the first document of each range, and the one behind its last
    first = np.searchsorted(offsets, covered[:, 0], side="right") - 1
    behind = np.searchsorted(offsets, covered[:, 1], side="left")
    counts = behind - first
    which = np.repeat(np.arange(len(covered)), counts)
    documents = first[which] + np.arange(which.size) - np.repeat(np.cumsum(counts) - counts, counts)
    # the range within each document, then the spans that it touches
    begin, end = offsets[documents], offsets[documents + 1]
    low = (np.maximum(covered[which, 0], begin) - begin) // span_tokens
    high = -(-(np.minimum(covered[which, 1], end) - begin) // span_tokens)
    counts = np.maximum(high - low, 0)  # 0 for a document without a token
    each = np.repeat(np.arange(documents.size), counts)
    spans = low[each] + np.arange(each.size) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.minimum(span_tokens, (end - begin)[each] - spans * span_tokens)
    kept = spans < MOST_SPANS
    found = _rows(documents[each][kept], spans[kept], lengths[kept])
    # two ranges may touch one span without touching each other
    inside, firsts = np.unique(found.inside, return_index=True)
    return Rows(inside, found.lengths[firsts])


def used_shards(table: tuple[str, ...], columns: Sequence[np.ndarray]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the table without shards that no row id of the columns is in, and the columns with its numbers."""
    is_used = np.zeros(len(table), bool)
    for row_ids in columns:
        is_used[shards_of(row_ids)] = True
    if is_used.all():
        return table, list(columns)
    # shards 1 and 3 of four are used: news (-, 0, -, 1)
    news = (np.cumsum(is_used) - 1).astype(np.uint64) << SHARD_SHIFT
    kept = tuple(name for name, used in zip(table, is_used.tolist(), strict=True) if used)
    return kept, [news[shards_of(row_ids)] | row_ids & INSIDE for row_ids in columns]


def _rows(documents: np.ndarray, spans: np.ndarray, lengths: np.ndarray) -> Rows:
    inside = documents.astype(np.uint64) << np.uint64(SPAN_BITS) | spans.astype(np.uint64)
    return Rows(inside, lengths.astype(np.uint16))


def _union(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the union of ranges as disjoint rising ranges, (m, 2) int64."""
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    # a range begins anew where it starts behind everything before: starts (0, 2, 9), reach (4, 5, 11) give 0 and 9
    new = np.append(True, starts[1:] > reach[:-1])[: starts.size]
    firsts = np.flatnonzero(new)
    lasts = np.append(firsts[1:], starts.size)[: firsts.size] - 1
    return np.stack([starts[firsts], reach[lasts]], axis=1).astype(np.int64)
