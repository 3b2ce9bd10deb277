"""Counts of a corpus against counting by hand."""

import json

import numpy as np

from engine.corpus.assemble import Removed, statistics
from engine.corpus.encoded_chunks import Documents
from engine.corpus.statistics import Statistics


def counted():
    documents = Documents(
        lengths=np.array([3, 2, 8, 5, 4, 1024]),
        hashes=np.zeros((6, 2), np.uint64),
        is_validation=np.zeros(6, bool),
        text_bytes=np.array([6, 2, 12, 100, 100, 100]),
        unknown=np.array([1, 1, 3, 9, 9, 9]),
        unspelt=np.array([2, 0, 3, 99, 99, 99]),
        sentences=np.array([1, 1, 4, 9, 9, 9]),
        id_bytes=np.zeros(6, np.int64),
        id_hashes=np.empty((0, 2), np.uint64),
        empty=np.array(2),
        empty_unspelt=np.array(5),
    )
    side = np.array([True, True, True, True, True, False])
    gone = Removed(np.arange(6) == 3, np.isin(np.arange(6), (4, 5)))
    return statistics(documents, side, gone, empty=2, empty_unspelt=5)


def test_counts():
    found = counted()
    assert (found.documents, found.tokens, found.text_bytes, found.sentences) == (3, 13, 20, 6)
    assert found.bytes_per_token == 20 / 10  # ends of text are no text
    assert found.unknown_tokens == 5
    assert found.unknown_rate == 5 / 10
    assert (found.unspelt_bytes, found.left_out_bytes) == (2 + 3 + 5, 5)
    assert found.unspelt_rate == 10 / 25
    assert found.lengths == {1: 2, 3: 1}  # 2 and 3 tokens; 8 tokens
    assert (found.empty_documents, found.exact_duplicates, found.near_duplicates) == (2, 1, 1)


def test_json_and_back():
    assert Statistics.from_json(json.loads(json.dumps(counted().to_json()))) == counted()


def test_nothing_counted_divides_by_nothing():
    nothing = Statistics()
    assert (nothing.bytes_per_token, nothing.unknown_rate, nothing.unspelt_rate) == (0, 0, 0)
