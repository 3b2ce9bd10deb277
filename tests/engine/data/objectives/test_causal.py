"""The causal objective: what follows, weighed 1, but for padding and for what lies behind an end of text."""

import numpy as np
import pytest

from engine.data.objectives.causal import causal
from engine.data.objectives.packing import Row
from engine.data.validation import ValidationSamples
from tests.engine.data.corpus import EOS, made_up_documents, write_shards


def test_a_row_by_hand():
    stretch = np.array([5, 6, EOS, 7, EOS, 8], np.uint16)
    row = Row(stretch[:-1], stretch[1:], np.array([3]), np.array([2, 4]))
    for inside, expected in ((True, [1, 1, 0, 1, 0, 0, 0, 0]), (False, [1, 1, 1, 1, 1, 0, 0, 0])):
        targets, weights = np.zeros((1, 8), np.int64), np.zeros((1, 8), np.float32)
        causal([row], targets, weights, inside)
        assert targets[0].tolist() == [6, EOS, 7, EOS, 8, 0, 0, 0]
        assert weights[0].tolist() == expected


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("attention", ["document", "row"])
def test_total_weight_is_the_number_of_targets_of_the_corpus(tmp_path, attention, packing):
    documents = made_up_documents(50)
    dataset = write_shards(tmp_path, documents, shard_tokens=200)
    total = 0.0
    for batch in ValidationSamples(dataset, 16, attention, packing=packing).batches(0, 1, 4):
        weights, tokens = batch.inputs["weights_BT"], batch.inputs["tokens_BT"]
        total += batch.weights["causal"]
        assert batch.weights["causal"] == weights.sum()
        if attention == "document":  # what follows an end of text is no target
            assert not weights[tokens == EOS].any()
    # the first token of a document (or of a shard) follows nothing
    firsts = dataset.num_shards if (attention, packing) == ("row", "concatenate") else len(documents)
    assert total == sum(document.size for document in documents) - firsts
