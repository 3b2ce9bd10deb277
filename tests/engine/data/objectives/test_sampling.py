"""Samples of every objective: the same under any world size, complete, typed as promised, and refused with a reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config.objectives import num_masked, span_lengths
from engine.config.schema.data import Attention
from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.shards.dataset import TokenDataset
from engine.data.stream import Stream
from engine.data.validation import ValidationSamples
from engine.errors import DataError
from tests.engine.data.corpus import EOS, FILL, SPECIAL, made_up_documents, write_sentences, write_shards

LENGTH = 32
CASES = {
    "causal": ({"name": "causal"}, "concatenate"),
    "best fit": ({"name": "causal"}, "best_fit"),
    "fill in the middle": ({"name": "fill_in_the_middle"}, "concatenate"),
    "masked": ({"name": "masked"}, "concatenate"),
    "whole words": ({"name": "masked", "mask_unit": "word"}, "concatenate"),
    "masked spans, best fit": ({"name": "masked", "mask_unit": "span"}, "best_fit"),
    "next sentence": ({"name": "masked", "pairs": "next_sentence"}, "concatenate"),
    "sentence order": ({"name": "masked", "pairs": "sentence_order"}, "concatenate"),
    "span corruption": ({"name": "span_corruption"}, "concatenate"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_sentences(tmp_path_factory.mktemp("sampling"), 60, shard_tokens=500)


@pytest.fixture(params=CASES)
def case(request):
    objective, packing = CASES[request.param]
    return {"packing": packing, "objective": ObjectiveConfig.model_validate(objective)}


def loader(dataset, case, attention: Attention = "document", seed=1):
    return Loader(Stream(dataset, LENGTH, 12, seed, 4, attention, **case))


def rows_of(batches):
    """Every row as bytes of all its inputs, by address."""
    found = {}
    for batch in batches:
        for b in range(batch.num_rows):
            if batch.sources[b]:
                content = b"".join(batch.inputs[name][b].numpy().tobytes() for name in sorted(batch.inputs))
                found[tuple(batch.samples_B3[b].tolist())] = (batch.sources[b], content)
    return found


def test_rows_and_masks_do_not_move_under_another_world_size(dataset, case):
    alone = loader(dataset, case)
    worlds = {(size, micro): [loader(dataset, case) for _ in range(size)] for size, micro in ((2, 3), (4, 1), (12, 1))}
    for _ in range(6):  # over more than one epoch
        whole = rows_of(alone.step(0, 1, 12))
        assert len(whole) == 12
        for (size, micro), ranks in worlds.items():
            parts = {}
            for data_rank, rank in enumerate(ranks):
                parts |= rows_of(rank.step(data_rank, size, micro))
            assert parts == whole
    assert alone.stream.samples_per_epoch() > 0


def test_a_restored_loader_goes_on_with_the_same_rows(dataset, case):
    first = loader(dataset, case)
    for _ in range(9):
        first.stream.skip()
    other = loader(dataset, case)
    other.stream.restore(first.stream.state())
    assert other.stream.sample_hash(50) == first.stream.sample_hash(50)
    assert rows_of(other.step(0, 1, 12)) == rows_of(first.step(0, 1, 12))


def test_each_epoch_visits_each_row_once(dataset, case):
    reader = Loader(Stream(dataset, LENGTH, 1, 0, 4, "document", **case))
    total = reader.stream.samples_per_epoch()
    epochs = [[batch.sources[0] for _ in range(total) for batch in reader.step(0, 1, 1)] for _ in range(2)]
    assert len(set(epochs[0])) == total
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_held_out_samples_are_the_same_in_every_layout_and_for_every_seed(dataset, case):
    held_out = ValidationSamples(dataset, LENGTH, "document", **case)
    whole = list(held_out.batches(0, 1, 5))
    for size, micro in ((2, 3), (3, 1)):
        parts = [batch for rank in range(size) for batch in held_out.batches(rank, size, micro)]
        assert rows_of(parts) == rows_of(whole)
        for name in whole[0].weights:
            assert sum(b.weights[name] for b in parts) == sum(b.weights[name] for b in whole) > 0


@pytest.mark.parametrize("attention", ["document", "row"])
def test_types_shapes_and_weights(dataset, case, attention):
    if case["packing"] == "best_fit" and attention == "row":
        return
    objective = case["objective"]
    [batch] = loader(dataset, case, attention).step(0, 1, 12)
    row, many = (12, LENGTH), num_masked(LENGTH, objective.rate)
    expected = {"tokens_BT": row, "targets_BT": row, "weights_BT": row, "segments_BT": row}
    if objective.name == "masked":
        expected = {"tokens_BT": row, "segments_BT": row}
        expected |= dict.fromkeys(("masked_BM", "targets_BM", "weights_BM"), (12, many))
        if objective.pairs != "none":
            expected |= {"token_types_BT": row, "pair_targets_B": (12,), "pair_weights_B": (12,)}
    elif objective.name == "span_corruption":
        spelt = (12, span_lengths(LENGTH, objective.rate, objective.mean_span_length).decoder)
        expected = {"tokens_BS": row, "segments_BS": row}
        expected |= dict.fromkeys(("decoder_tokens_BT", "targets_BT", "weights_BT", "decoder_segments_BT"), spelt)
    if attention == "row":
        expected.pop("segments_BT", None)  # an encoder-decoder has them for its padding
        if objective.name == "masked":
            expected["segments_BT"] = row
    assert {name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} == expected
    for name, tensor in batch.inputs.items():
        is_weight, is_segment = "weights" in name, "segments" in name
        assert tensor.dtype == (torch.float32 if is_weight else torch.int32 if is_segment else torch.int64), name
    of_loss = {"causal": "weights_BT", "mlm": "weights_BM", "pairs": "pair_weights_B", "span": "weights_BT"}
    assert all(batch.weights[name] == batch.inputs[of_loss[name]].sum() > 0 for name in batch.weights)
    assert all(int(lengths.sum()) == LENGTH for lengths in batch.document_lengths)


def test_a_row_that_stands_for_nothing_weighs_nothing(dataset, case):
    last = list(ValidationSamples(dataset, LENGTH, "document", max_samples=9, **case).batches(1, 2, 4))[-1]
    assert last.sources == ("",) * 4
    assert not any(last.weights.values())
    assert not any(tensor.any() for name, tensor in last.inputs.items() if "weights" in name)


def test_pairs_stand_between_their_marks(dataset):
    [batch] = loader(
        dataset, {"objective": ObjectiveConfig(name="masked", pairs="next_sentence", mask_share=0.0, random_share=0.0)}
    ).step(0, 1, 12)
    for tokens, types, segments, counts in zip(
        *(batch.inputs[name].tolist() for name in ("tokens_BT", "token_types_BT", "segments_BT", "pair_weights_B")),
        strict=True,
    ):
        marks = [t for t, token in enumerate(tokens) if token == SPECIAL["separate"]]
        assert tokens[0] == SPECIAL["classify"]
        assert len(marks) == 1 + int(counts)
        assert types == [int(marks[0] < t <= marks[-1]) for t in range(LENGTH)]
        assert segments == [int(t > marks[-1]) for t in range(LENGTH)]
        assert set(tokens[marks[-1] + 1 :]) <= {SPECIAL["padding"]}


def test_documents_are_rearranged_at_the_rate_and_hold_the_same_tokens(tmp_path):
    dataset = write_sentences(tmp_path, 400, shard_tokens=10**6)
    shard = dataset.shard(0)
    documents = {tuple(part[:-1].tolist()) for part in np.split(shard.tokens, shard.documents[1:-1])}
    prefix, middle, suffix = FILL
    for rate in (0.0, 0.3, 1.0):
        objective = ObjectiveConfig(name="fill_in_the_middle", fill_rate=rate)
        whole = rearranged = suffix_first = 0
        for batch in ValidationSamples(dataset, 512, "document", objective=objective).batches(0, 1, 1):
            tokens = batch.inputs["tokens_BT"][0].tolist()
            for part in "".join(f"{t} " for t in tokens).split(f" {EOS} ")[1:-1]:
                ids = [int(token) for token in part.split()]
                if len(ids) < 8 or EOS in ids:
                    continue
                whole += 1
                if ids[0] != prefix:
                    assert tuple(ids) in documents
                    continue
                rearranged += 1
                at = ids.index(middle)
                suffix_first += ids[1] == suffix
                inner, behind = ids[at + 1 :], ids[ids.index(suffix) + 1 : at]
                if ids[1] == suffix:  # prefix and middle stand behind the mark of the middle, one after the other
                    assert (*inner, *behind) in documents
                else:
                    assert (*ids[1 : ids.index(suffix)], *inner, *behind) in documents
        assert abs(rearranged / whole - rate) <= 4.5 * (rate * (1 - rate) / whole) ** 0.5
        if rearranged:
            assert abs(suffix_first / rearranged - 0.5) < 4.5 * 0.5 / rearranged**0.5


def test_shards_of_an_older_prepare_are_refused(tmp_path):
    old = write_shards(tmp_path, made_up_documents(20))
    with pytest.raises(DataError, match="do not say which tokens are special") as caught:
        Loader(Stream(old, LENGTH, 1, 0, 4, "document", objective=ObjectiveConfig(name="masked")))
    assert "prepare the text again with --overwrite" in str(caught.value)


def test_what_the_shards_lack_is_named_with_the_remedy(dataset, monkeypatch):
    index = dataset.index

    def refused(objective, **changes):
        vocabulary = replace(index.vocabulary, **{k: v for k, v in changes.items() if k != "shards"})
        shards = changes.get("shards", index.shards)
        monkeypatch.setattr(dataset, "index", replace(index, vocabulary=vocabulary, shards=shards))
        with pytest.raises(DataError) as caught:
            Loader(Stream(dataset, LENGTH, 1, 0, 4, "document", objective=ObjectiveConfig.model_validate(objective)))
        return str(caught.value)

    assert "has no mask token" in refused({"name": "masked"}, mask=None)
    assert "tokens for [CLS] and [SEP]" in refused({"name": "masked", "pairs": "next_sentence"}, classify=None)
    assert "2 sentinels (it has 1)" in refused({"name": "span_corruption"}, sentinels=(999,))
    assert "--purpose span_corruption" in refused({"name": "span_corruption"}, sentinels=())
    assert "marks of prefix, middle and suffix" in refused({"name": "fill_in_the_middle"}, fill=())
    without = tuple(replace(shard, sentences=None) for shard in index.shards)
    message = refused({"name": "masked", "pairs": "sentence_order"}, shards=without)
    assert "have no sentences" in message
    assert "--sentences LANGUAGE" in message
