"""Rows cover a shard exactly, and documents are where they were."""

import numpy as np
import pytest

from engine.data.packing import num_rows, pack, rows_per_shard
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards


@pytest.mark.parametrize("length", [1, 2, 7, 16, 100, 5000])
def test_every_token_but_the_first_follows_an_input_exactly_once(tmp_path, length):
    dataset = write_shards(tmp_path, made_up_documents(40), shard_tokens=250)
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        rows = int(num_rows(np.array(shard.tokens.size), length))
        assert rows == -(-(shard.tokens.size - 1) // length)
        packed = [pack(shard, row, length) for row in range(rows)]
        assert np.array_equal(np.concatenate([row.tokens[1:] for row in packed]), shard.tokens[1:])
        assert np.array_equal(np.concatenate([row.tokens[:-1] for row in packed]), shard.tokens[:-1])


@pytest.mark.parametrize("length", [3, 8, 64])
def test_segments_and_lengths_agree_with_counting_ends_of_text(tmp_path, length):
    dataset = write_shards(tmp_path, made_up_documents(40, longest=20), shard_tokens=150)
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for number_of_row in range(int(num_rows(np.array(shard.tokens.size), length))):
            row = pack(shard, number_of_row, length)
            # independent of the offsets: a document begins after each end-of-text
            expected, document = [], 0
            for token in row.tokens[:-1].tolist():
                expected.append(document)
                document += token == 0
            if len(expected) < length:  # padding is a document of its own
                expected += [expected[-1] + 1] * (length - len(expected))
            segments = row.segments()
            assert segments.tolist() == expected
            assert row.document_lengths().tolist() == np.bincount(expected).tolist()
            assert np.array_equal(np.concatenate(row.documents()), row.tokens[:-1])
            assert len(row.documents()) == len(set(expected[: row.num_inputs]))


def test_shards_too_short_for_a_target_have_no_row():
    assert num_rows(np.array([0, 1, 2, 5, 6]), 4).tolist() == [0, 0, 1, 1, 2]


def test_a_data_set_without_a_sample_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no sample: 0 documents, 0 tokens"):
        rows_per_shard(write_shards(tmp_path, []), 8)
