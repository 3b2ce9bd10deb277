"""The documents that a run has trained on between two positions of its stream, as rows of a reservoir.

A document counts as soon as a sample has touched it, in spans of long ones those that were touched. The rows are a
function of the stream's order and of the positions alone, and may be shared out over any number of ranks: who admits
them twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.data.mixed_order import Cursor
from engine.data.replay.rows import Rows, rows_in
from engine.data.stream import Stream

_SAMPLES = 1 << 16
"""Samples that are looked up at once."""


class TrainedRows(NamedTuple):
    """Rows of one shard that were trained on."""

    source: int
    """Number of the source in the mixture."""
    shard: int
    """Number of the shard in the source's data set."""
    rows: Rows


def trained_rows(
    stream: Stream, start: Cursor, end: int, span_tokens: int, position: int = 0, size: int = 1
) -> Iterator[TrainedRows]:
    """Yield the rows that samples from a cursor up to position `end` have touched, in pieces of a shard each.

    Of `size` ranks, each takes its share by its `position`; together they have all. Replayed samples are left out:
    replay does not make a document more likely to be replayed again. Reads offsets and no token.

    Raises:
        DataError: offsets are damaged.
    """
    order = stream.order
    for samples in order.between(start, end, _SAMPLES):
        mine = samples.at(np.array_split(np.arange(samples.size), size)[position])
        for number, source in enumerate(order.sources):
            if source.part.is_replay:
                continue
            addresses_N3 = mine.addresses_N3[mine.sources_N == number]
            if not len(addresses_N3):
                continue
            ranges_M3 = source.sampler.ranges(addresses_N3, source.order.shard_rows_at(addresses_N3))
            for shard in np.unique(ranges_M3[:, 0]).tolist():
                starts, ends = ranges_M3[ranges_M3[:, 0] == shard, 1:].T
                documents, _ = source.dataset.offsets(shard)
                yield TrainedRows(number, shard, rows_in(starts, ends, documents, span_tokens))
