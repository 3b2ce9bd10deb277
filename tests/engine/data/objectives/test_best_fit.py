"""Best-fit packing: documents whole, nothing lost, as tight as a plain best-fit decreasing, a loss as if alone."""

import numpy as np
import pytest
import torch

from engine.config.schema.model import make_model
from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.best_fit import BestFit, best_fit_decreasing
from engine.data.validation import ValidationSamples
from engine.models.families import family
from tests.engine.data.corpus import VOCABULARY, made_up_documents, write_sentences, write_shards


def plain(costs, capacity):
    """Best-fit decreasing by looking at every bin; returns the rooms left."""
    rooms = []
    for cost in sorted(costs, reverse=True):
        fitting = [room for room in rooms if room >= cost]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - cost)
        else:
            rooms.append(capacity - cost)
    return rooms


@pytest.mark.parametrize("capacity", [1, 10, 64])
def test_bins_are_those_of_a_plain_search(capacity):
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(1, capacity + 1, 200)
        bins = best_fit_decreasing(costs, capacity)
        used = np.bincount(bins, costs)
        assert used.max() <= capacity
        assert sorted(capacity - used) == sorted(plain(costs.tolist(), capacity))


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("capacity", [5, 16, 40, 100])
def test_every_token_is_read_once_and_documents_that_fit_stay_whole(tmp_path, capacity, lookahead):
    documents = made_up_documents(60)
    dataset = write_shards(tmp_path, documents, shard_tokens=500)
    packing = BestFit(dataset, capacity, lookahead)
    parts, rows = [], 0
    for number in range(dataset.num_shards):
        shard = dataset.shard(number)
        for row_number in range(int(packing.count(np.array([number]))[0])):
            row = packing.row(shard, number, row_number)
            assert row.tokens.size <= capacity
            parts += [part.tolist() for part in row.documents()]
            rows += 1
    expected = []
    for document in documents:
        tokens = document[:-1] if lookahead else document
        expected += [tokens[at : at + capacity].tolist() for at in range(0, tokens.size, capacity)]
    assert sorted(parts) == sorted(expected)
    assert rows < len(expected) or capacity == 5


def test_successors_are_the_tokens_behind(tmp_path):
    documents = made_up_documents(60)
    follow = {}
    for document in documents:
        for one, other in zip(document[:-1].tolist(), document[1:].tolist(), strict=True):
            follow.setdefault(one, set()).add(other)
    for batch in ValidationSamples(write_shards(tmp_path, documents), 32, "document", packing="best_fit").batches(
        0, 1, 8
    ):
        weights = batch.inputs["weights_BT"] > 0
        pairs = zip(
            batch.inputs["tokens_BT"][weights].tolist(), batch.inputs["targets_BT"][weights].tolist(), strict=True
        )
        assert all(other in follow[one] for one, other in pairs)


def test_a_masked_document_stands_whole_behind_its_own_mark(tmp_path):
    dataset = write_sentences(tmp_path, 40, shard_tokens=2000)
    objective = ObjectiveConfig(name="masked", mask_share=0.0, random_share=0.0)  # seen as they are
    parts = []
    for batch in ValidationSamples(dataset, 128, "document", packing="best_fit", objective=objective).batches(0, 1, 4):
        for tokens, lengths, source in zip(
            batch.inputs["tokens_BT"], batch.document_lengths, batch.sources, strict=True
        ):
            if source:
                pieces = torch.split(tokens, lengths.tolist())
                parts += [piece[1:].tolist() for piece in pieces if piece[0] == 901]
    shards = [dataset.shard(number) for number in range(dataset.num_shards)]
    documents = [part.tolist() for shard in shards for part in np.split(shard.tokens, shard.documents[1:-1])]
    assert sorted(parts) == sorted(documents)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_each_document_has_the_loss_that_it_has_alone(tmp_path, position):
    """Sums of at most 60 fp32 losses of about 7: rounding stays below 60 * 7 * 2^-24 * a few, far within 1e-5 each."""
    documents = made_up_documents(30)
    dataset = write_shards(tmp_path, documents)
    config = make_model(
        vocab_size=VOCABULARY, num_layers=2, hidden_size=32, num_heads=4, max_positions=128, position=position
    )
    model = family(config).build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)

        def loss(tokens, targets, weights, segments=None):
            inputs = {"tokens_BT": tokens, "targets_BT": targets, "weights_BT": weights}
            found = model(**inputs, **({} if segments is None else {"segments_BT": segments}))
            return float(found["losses_L"][0])

        alone = {}
        for document in documents:
            tokens = torch.from_numpy(document.astype(np.int64))[None]
            alone[tuple(document[:-1].tolist())] = loss(tokens[:, :-1], tokens[:, 1:], torch.ones(1, document.size - 1))
        seen = 0
        for batch in ValidationSamples(dataset, 96, "document", packing="best_fit").batches(0, 1, 4):
            tokens, segments = batch.inputs["tokens_BT"], batch.inputs["segments_BT"]
            for b, lengths in enumerate(batch.document_lengths):
                for number in range(len(lengths)):
                    mine = (segments[b] == number) & (batch.inputs["weights_BT"][b] > 0)
                    if not mine.any():
                        continue
                    weights = torch.zeros_like(batch.inputs["weights_BT"])
                    weights[b] = mine.float()
                    packed = loss(tokens, batch.inputs["targets_BT"], weights, segments)
                    expected = alone[tuple(tokens[b][mine].tolist())]
                    count = int(mine.sum())
                    assert packed / count == pytest.approx(expected / count, abs=1e-5)
                    seen += 1
        assert seen == len(documents)
