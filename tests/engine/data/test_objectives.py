"""The causal objective: what follows, weighed 1, but for padding and for what lies behind an end-of-text."""

import numpy as np
import pytest

from engine.data.objectives import causal
from engine.data.packing import Row, num_rows, pack
from tests.engine.data.corpus import EOS, made_up_documents, write_shards


def test_a_row_by_hand():
    row = Row(np.array([5, 6, EOS, 7, EOS, 8], np.uint16), np.array([3, 5]), length=8)
    tokens, targets, weights = causal(row, "document", padding_id=EOS)
    assert tokens.tolist() == [5, 6, EOS, 7, EOS, EOS, EOS, EOS]
    assert targets.tolist() == [6, EOS, 7, EOS, 8, EOS, EOS, EOS]
    assert weights.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert causal(row, "row", padding_id=EOS)[2].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int64, np.int64, np.float32)


@pytest.mark.parametrize("attention", ["document", "row"])
def test_total_weight_is_the_number_of_targets_of_the_corpus(tmp_path, attention):
    documents = made_up_documents(50)
    dataset = write_shards(tmp_path, documents, shard_tokens=200)
    total = 0.0
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for row in range(int(num_rows(np.array(shard.tokens.size), 16))):
            packed = pack(shard, row, 16)
            tokens, _, weights = causal(packed, attention, EOS)
            total += weights.sum()
            if attention == "document":  # what follows an end-of-text is no target
                assert not weights[tokens == EOS].any()
    # the first token of a document (or of a shard) follows nothing
    firsts = len(documents) if attention == "document" else dataset.num_shards
    assert total == sum(document.size for document in documents) - firsts
