"""The causal objective: what follows, weighed 1, but for padding and for what lies behind an end of text."""

import numpy as np
import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.causal import CausalSampler
from engine.data.objectives.sampling import SamplerContext
from engine.data.validation import ValidationSamples
from tests.engine.data.corpus import EOS, made_up_documents, write_shards


def sampler_of(folder, documents, attention, length=8):
    return CausalSampler(
        SamplerContext(write_shards(folder, documents), length, 0, attention, "concatenate", ObjectiveConfig())
    )


@pytest.mark.parametrize(("attention", "expected"), [("document", [1, 1, 0, 1, 0]), ("row", [1, 1, 1, 1, 1])])
def test_a_row_by_hand(tmp_path, attention, expected):
    documents = [np.array([5, 6, EOS]), np.array([7, EOS]), np.array([8])]
    made = sampler_of(tmp_path, documents, attention).make(np.zeros((1, 3), np.int64), np.zeros((1, 2), np.int64), 2)
    assert made.inputs["tokens_BT"][0, :5].tolist() == [5, 6, EOS, 7, EOS]
    assert made.inputs["targets_BT"][0, :5].tolist() == [6, EOS, 7, EOS, 8]
    assert made.inputs["weights_BT"].tolist() == [[*expected, 0, 0, 0], [0] * 8], "padding and padding rows weigh 0"
    assert made.weights["causal"].tolist() == [sum(expected), 0]
    assert made.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8]


@pytest.mark.parametrize("attention", ["document", "row"])
def test_rows_that_are_read_at_once_are_those_read_one_by_one(tmp_path, monkeypatch, attention):
    sampler = sampler_of(tmp_path, made_up_documents(20), attention, 16)
    places = np.array([[0, row] for row in range(int(sampler.count(np.array([0]))[0]))])
    together = sampler.make(np.zeros((0, 3), np.int64), places, len(places) + 1)
    rows = [sampler.row(place) for place in places.tolist()]
    monkeypatch.setattr(sampler, "read", lambda *arguments: sampler.laid_out(rows, len(places) + 1))
    one_by_one = sampler.make(np.zeros((0, 3), np.int64), places, len(places) + 1)
    for name, values in together.inputs.items():
        assert np.array_equal(values, one_by_one.inputs[name]), name
    assert np.array_equal(together.weights["causal"], one_by_one.weights["causal"])
    assert np.array_equal(together.documents, one_by_one.documents)


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
