"""Rows: documents and their spans, counted against a loop over tokens."""

import numpy as np

from engine.data.replay.rows import SHARD_SHIFT, documents_of, rows_in, rows_of, spans_of, used_shards


def named(rows):
    triples = zip(documents_of(rows.inside), spans_of(rows.inside), rows.lengths, strict=True)
    return [tuple(map(int, triple)) for triple in triples]


def test_long_documents_have_spans():
    offsets = np.array([0, 5, 7, 7, 10])
    assert named(rows_of(np.array([0, 1, 2, 3]), offsets, 3)) == [(0, 0, 3), (0, 1, 2), (1, 0, 2), (3, 0, 3)]
    assert named(rows_of(np.array([3, 0]), offsets, 10)) == [(3, 0, 3), (0, 0, 5)]


def test_ranges_of_tokens_touch_the_rows_that_a_loop_finds():
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(0, 8, generator.integers(1, 12))
        offsets = np.append(0, np.cumsum(lengths))
        if not offsets[-1]:
            continue
        span = int(generator.integers(1, 6))
        starts = generator.integers(0, offsets[-1], generator.integers(1, 6))
        ends = np.minimum(starts + generator.integers(1, 9, starts.size), offsets[-1])
        found = set()
        for start, end in zip(starts, ends, strict=True):
            for token in range(start, end):
                document = next(d for d in range(lengths.size) if offsets[d] <= token < offsets[d + 1])
                number = (token - offsets[document]) // span
                found.add((document, number, min(span, lengths[document] - number * span)))
        assert named(rows_in(starts, ends, offsets, span)) == sorted(found)


def test_a_table_keeps_the_shards_that_are_used():
    row_ids = np.array([1, 3, 1], np.uint64) << SHARD_SHIFT | np.array([7, 8, 9], np.uint64)
    table, (moved,) = used_shards(("a", "b", "c", "d"), [row_ids])
    assert table == ("b", "d")
    assert moved.tolist() == [7, (1 << 44) | 8, 9]
