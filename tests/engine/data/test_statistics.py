"""Counts of a corpus against counting by hand."""

import json

import numpy as np

from engine.data.statistics import Statistics


def counted():
    statistics = Statistics(empty_documents=2)
    for ids, size in (([5, 9, 0], 6), ([9, 0], 2), ([1, 2, 3, 4, 9, 9, 9, 0], 12)):
        statistics.add(np.array(ids), size, unknown_id=9)
    return statistics


def test_counts():
    statistics = counted()
    assert (statistics.documents, statistics.tokens, statistics.text_bytes) == (3, 13, 20)
    assert statistics.bytes_per_token == 20 / 10  # ends of text are no text
    assert statistics.unknown_tokens == 5
    assert statistics.unknown_rate == 5 / 10
    assert statistics.lengths == {1: 2, 3: 1}  # 2 and 3 tokens; 8 tokens


def test_json_and_back():
    assert Statistics.from_json(json.loads(json.dumps(counted().to_json()))) == counted()


def test_nothing_counted_divides_by_nothing():
    assert (Statistics().bytes_per_token, Statistics().unknown_rate) == (0, 0)
