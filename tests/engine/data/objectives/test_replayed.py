"""Rows of two objectives in one stream: as their own objective makes them, with weight 0 for the other's targets."""

from typing import Any

import numpy as np
import pytest

from engine.config.objectives import has_segments
from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.stage import RunStage
from engine.data.loader import Loader
from engine.data.objectives.sampling import make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.source import source_seed
from engine.data.stage import open_parts, stage_stream
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.validation import ValidationSamples
from engine.errors import DataError
from tests.distributed.runs import write_sentences

LENGTH, BATCH, RATIO, SEED = 24, 8, 0.4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token shards of text and, in `examples`, of labelled examples."""
    folder = tmp_path_factory.mktemp("text")
    write_sentences(folder, "wordpiece", 260, "masked")
    tokenizer = load_tokenizer(folder / "tokenizer")
    shape = (folder / "examples", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash)
    with ShardWriter(*shape, vocabulary=tokenizer.vocabulary) as writer:
        for number in range(30):
            writer.add(np.arange(5, 9 + number % 3), columns={"label": number % 2})
    return folder


def stage_of(folder, **replay: Any) -> RunStage:
    given = {"ratio": RATIO, "source": str(folder / "train"), "objective": "masked"} | replay
    return RunStage.model_validate(
        {
            "data": {"train": str(folder / "examples"), "window_shards": 2},
            "objective": {"name": "classification", "labels": ("a", "b")},
            "replay": given,
            "sequence_length": LENGTH,
            "global_batch_size": BATCH,
            "duration": {"steps": 20},
        }
    )


def stream_of(folder, **replay: Any):
    stage = stage_of(folder, **replay)
    return stage_stream(stage, open_parts(stage, None, 10_000), SEED)


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (2, 2), (3, 1)])
def test_rows_are_those_of_their_own_objectives_in_every_layout(folder, ranks, size):
    stream = stream_of(folder)
    alone = {}
    for number, (part, objective) in enumerate(zip(stream.parts, (stream.objective, None), strict=True)):
        given = (part.dataset, LENGTH, source_seed(SEED, part.name), "document", "concatenate")
        alone[number] = make_sampler(*given, objective or ObjectiveConfig(name="masked"))
    loaders = [Loader(stream_of(folder)) for _ in range(ranks)]
    replayed = 0
    for step in range(6):
        batches = [batch for rank, one in enumerate(loaders) for batch in one.step(rank, ranks, size)]
        names = {tuple(sorted((name, tuple(array.shape)) for name, array in batch.inputs.items())) for batch in batches}
        assert len(names) == 1, "inputs and shapes do not depend on the rows"
        for batch in batches:
            for row, source in enumerate(batch.sources):
                if not source:
                    assert not batch.row_target_weights["classification"][row]
                    continue
                domain = int(batch.domains_B[row])
                replayed += domain
                shard, number = source.rsplit(":", 1)
                shards = stream.parts[domain].dataset.index.shards
                place = [next(n for n, one in enumerate(shards) if one.tokens.name == shard), int(number)]
                made = alone[domain].make(batch.samples_B3[row].numpy()[None], np.array([place]), 1)
                for name, array in made.inputs.items():
                    known = f"replay_{name}" if domain and name.startswith(("masked", "targets", "weights")) else name
                    assert np.array_equal(batch.inputs[known][row].numpy(), array[0]), name
                other = "label_weights_B" if domain else "replay_weights_BM"
                assert not batch.inputs[other][row].any()
                (weight,) = (weights[0] for weights in made.weights.values())
                assert batch.row_target_weights["classification"][row] == weight
        # 0.4 of 8 rows in each step, to one row over any number of steps
        assert abs(replayed - RATIO * BATCH * (step + 1)) < 1


def test_the_state_knows_the_objective(folder):
    stream = stream_of(folder)
    stream.skip()
    again = stream_of(folder)
    again.restore(stream.state())
    assert again.sample_hash(20) == stream.sample_hash(20)
    with pytest.raises(DataError, match="mixture"):
        stream_of(folder, objective={"name": "masked", "rate": 0.3}).restore(stream.state())


def test_text_alone_has_no_mask_token(folder, tmp_path):
    tokenizer = load_tokenizer(folder / "tokenizer")
    with ShardWriter(tmp_path / "plain", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash) as writer:
        writer.add(np.arange(5, 90))
    assert TokenDataset(str(tmp_path / "plain")).index.vocabulary is None
    with pytest.raises(DataError, match="do not say which tokens are special"):
        stream_of(folder, source=str(tmp_path / "plain"))


@pytest.mark.parametrize("task", ["classification", "answer"])
@pytest.mark.parametrize(("text", "attention"), [("causal", "row"), ("causal", "document"), ("masked", "row")])
def test_held_out_text_alone_has_the_segments_that_a_pipeline_sends(folder, text, attention, task):
    """The model is built for rows with the inputs of its task (`has_segments`), and held-out rows are of one kind."""
    beside = ObjectiveConfig(name=task)
    assert has_segments(attention, beside)
    given = TokenDataset(str(folder / "train")), LENGTH, attention
    samples = ValidationSamples(*given, objective=ObjectiveConfig(name=text), beside=beside)
    for batch in samples.batches(0, 1, 4):
        segments_BT = batch.inputs["segments_BT"].numpy()
        assert (segments_BT.shape, segments_BT.dtype) == ((4, LENGTH), np.int32)
        if text == "causal" and attention == "row":
            assert not np.ptp(segments_BT, axis=1).any(), "the whole row sees itself"


def test_held_out_spans_keep_the_inputs_of_encoder_and_decoder(tmp_path):
    write_sentences(tmp_path, "bpe", 400, "span_corruption")
    given = TokenDataset(str(tmp_path / "train")), LENGTH, "row"
    spans = ObjectiveConfig(name="span_corruption")
    names = [
        {
            name
            for batch in ValidationSamples(*given, objective=spans, beside=beside).batches(0, 1, 4)
            for name in batch.inputs
        }
        for beside in (None, ObjectiveConfig(name="answer", answer_length=LENGTH))
    ]
    assert names[0] == names[1] >= {"segments_BS", "decoder_segments_BT"}
