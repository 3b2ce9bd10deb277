"""Rows of prompts and answers: every token of an answer is a target once, and nothing else is."""

import itertools
from typing import Any

import numpy as np
import pytest

from engine.config.schema.objective import ObjectiveConfig
from engine.data.objectives.sampling import make_sampler
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.tombstones import Tombstones
from engine.data.shards.writer import ShardWriter
from engine.errors import DataError
from tests.engine.data.corpus import EOS, write_shards

VOCABULARY = 97


def write_examples(folder, examples, shard_bytes=2 * 100, **opened):
    """Shards of examples, each a list of (prompt, answer) tokens."""
    with ShardWriter(folder, VOCABULARY, EOS, "test", shard_bytes=shard_bytes) as writer:
        for rounds in examples:
            parts = [np.array(part) for one in rounds for part in one]
            lengths = np.array([part.size for part in parts])
            writer.add(np.concatenate(parts), np.cumsum(lengths) - lengths)
    return TokenDataset(folder, **opened)


def made_up(count, most_rounds=3, seed=0):
    """Examples whose prompts are tokens of 10 to 49, and whose answers are of 50 and more, with an end of text."""
    draw = np.random.default_rng(seed)

    def one():
        prompt = draw.integers(10, 50, draw.integers(1, 7)).tolist()
        return prompt, [*draw.integers(50, VOCABULARY, draw.integers(0, 5)).tolist(), EOS]

    return [[one() for _ in range(draw.integers(1, most_rounds + 1))] for _ in range(count)]


def sampler_of(dataset, length, packing: Any = "concatenate", answer_length=0):
    objective = ObjectiveConfig(name="answer", answer_length=answer_length)
    return make_sampler(dataset, length, 0, "document", packing, objective)


def all_rows(dataset, sampler):
    counts = sampler.count(np.arange(dataset.num_shards))
    found = [(shard, row) for shard, count in enumerate(counts.tolist()) for row in range(count)]
    return np.array(found), np.zeros((len(found), 3), np.int64)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_targets_are_the_tokens_of_the_answers(tmp_path, packing):
    """Told by the tokens' values alone: answers have tokens that prompts have not."""
    examples = made_up(60)
    dataset = write_examples(tmp_path, examples)
    assert dataset.num_shards > 3
    sampler = sampler_of(dataset, 40, packing)
    places, samples = all_rows(dataset, sampler)
    made = sampler.make(samples, places, len(places) + 2)
    inputs = made.inputs
    learned = inputs["weights_BT"] == 1
    assert set(np.unique(inputs["weights_BT"])) == {0.0, 1.0}
    expected = sorted(token for rounds in examples for _, answer in rounds for token in answer)
    assert sorted(inputs["targets_BT"][learned].tolist()) == expected
    assert made.weights["causal"].tolist() == learned.sum(axis=1).tolist()
    assert made.weights["causal"][-2:].tolist() == [0, 0]
    for tokens_T, targets_T, learned_T, segments_T in zip(
        inputs["tokens_BT"], inputs["targets_BT"], learned, inputs["segments_BT"], strict=True
    ):
        for position in np.flatnonzero(learned_T):
            # all of the document up to here is what the model has seen
            begin = int(np.flatnonzero(segments_T == segments_T[position])[0])
            seen = [*tokens_T[begin : position + 1].tolist(), int(targets_T[position])]
            whole = [[token for one in rounds for part in one for token in part] for rounds in examples]
            assert any(example[: len(seen)] == seen for example in whole)


def test_rows_do_not_depend_on_their_batch(tmp_path):
    dataset = write_examples(tmp_path, made_up(20))
    sampler = sampler_of(dataset, 40)
    places, samples = all_rows(dataset, sampler)
    together = sampler.make(samples, places, len(places))
    for row in range(len(places)):
        alone = sampler.make(samples[row : row + 1], places[row : row + 1], 1)
        for name, values in together.inputs.items():
            assert np.array_equal(values[row : row + 1], alone.inputs[name]), name


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_answer(tmp_path):
    examples = made_up(30, most_rounds=1)
    dataset = write_examples(tmp_path, examples)
    sampler = sampler_of(dataset, 8, answer_length=6)
    places, samples = all_rows(dataset, sampler)
    inputs = sampler.make(samples, places, len(places) + 1).inputs
    for row, ((prompt, answer),) in enumerate(examples):
        assert inputs["tokens_BS"][row].tolist() == prompt + [EOS] * (8 - len(prompt))
        assert (inputs["segments_BS"][row] == 0).tolist() == [True] * len(prompt) + [False] * (8 - len(prompt))
        assert inputs["targets_BT"][row, : len(answer)].tolist() == answer
        assert inputs["decoder_tokens_BT"][row, : len(answer)].tolist() == [EOS, *answer[:-1]]
        assert inputs["weights_BT"][row].tolist() == [1.0] * len(answer) + [0.0] * (6 - len(answer))
    assert not inputs["weights_BT"][-1].any()


@pytest.mark.parametrize(("answer_length", "packing"), [(0, "concatenate"), (0, "best_fit"), (9, "concatenate")])
def test_a_forgotten_example_has_no_target(tmp_path, answer_length, packing):
    examples = made_up(12, most_rounds=1)
    entry = write_examples(tmp_path, examples, shard_bytes=1 << 20).index.shards[0]
    gone = np.array([3, 4, 11])
    dataset = TokenDataset(tmp_path, tombstones=Tombstones({entry.content_hash: gone}))
    sampler = sampler_of(dataset, 40, packing, answer_length)
    places, samples = all_rows(dataset, sampler)
    inputs = sampler.make(samples, places, len(places)).inputs
    learned = inputs["targets_BT"][inputs["weights_BT"] == 1]
    kept = [answer for number, ((_, answer),) in enumerate(examples) if number not in gone]
    assert sorted(learned.tolist()) == sorted(itertools.chain.from_iterable(kept))


def test_an_example_that_does_not_fit_is_refused(tmp_path):
    dataset = write_examples(tmp_path, [[([10] * 5, [60] * 4)]])
    for length, answer_length, said in (
        (7, 0, "sequence_length = 7"),
        (5, 3, "answer_length = 3"),
        (4, 4, "length = 4"),
    ):
        with pytest.raises(DataError, match=said):
            sampler_of(dataset, length, answer_length=answer_length).make(
                np.zeros((1, 3), np.int64), np.zeros((1, 2), np.int64), 1
            )
    assert sampler_of(dataset, 8).make(np.zeros((1, 3), np.int64), np.zeros((1, 2), np.int64), 1)


def test_text_is_no_example(tmp_path):
    with pytest.raises(DataError, match="do not say where answers begin"):
        sampler_of(write_shards(tmp_path, [np.array([5, 6, EOS])]), 8)
