"""Rows of several lengths: a step's samples and their length do not depend on ranks or restarts, and what is cut off is
padding alone."""

import numpy as np
import pytest
import torch

from engine.config.schema.objective import ObjectiveConfig
from engine.data.loader import Loader
from engine.data.objectives.examples import LABEL, SECOND
from engine.data.row_lengths import example_lengths, fitting, needed_lengths
from engine.data.shards.dataset import TokenDataset
from engine.data.shards.writer import ShardWriter
from engine.data.stream import Stream
from engine.data.validation import ValidationSamples
from engine.errors import DataError

LENGTHS, LONGEST, BATCH, STEPS = (8, 16, 24), 40, 6, 40
OBJECTIVE = ObjectiveConfig(name="classification", labels=("a", "b"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "shards"
    draw = np.random.default_rng(1)
    with ShardWriter(folder, 100, 0, "hash", shard_bytes=2000) as writer:
        for number in range(101):
            count = int(draw.integers(2, LONGEST + 1))
            writer.add(draw.integers(1, 100, count), columns={LABEL: number % 2, SECOND: count // 2})
    return TokenDataset(folder)


def bin_of(length):
    return fitting(length, LENGTHS, LONGEST)


def stream(dataset, lengths=LENGTHS):
    shape = (LONGEST, BATCH, 5, 2, "document", "concatenate", OBJECTIVE)
    return Stream(dataset, *shape, row_lengths=lengths)


def steps_of(dataset, data_size=1, micro_batch_size=BATCH):
    """Batches of each step, of all data ranks in turn."""
    loaders = [Loader(stream(dataset)) for _ in range(data_size)]
    return [
        [batch for rank, loader in enumerate(loaders) for batch in loader.step(rank, data_size, micro_batch_size)]
        for _ in range(STEPS)
    ]


def test_a_step_is_as_long_as_its_longest_example_needs(dataset):
    found = []
    for [batch] in steps_of(dataset):
        longest = int((batch.inputs["segments_BT"] == 0).sum(1).max())
        length = batch.documents.shape[1]
        assert length == fitting(longest, LENGTHS, LONGEST)
        assert batch.inputs["tokens_BT"].shape == batch.inputs["token_types_BT"].shape == (BATCH, length)
        found.append(length)
    assert {*found} == {*LENGTHS, LONGEST}
    assert np.mean(found) < 0.75 * LONGEST


def test_the_length_that_an_example_needs_is_that_of_a_step_of_it_alone(dataset):
    rows = np.array([[0, 3], [1, 0], [0, 7], [1, 5]])
    lengths = example_lengths(dataset, rows).tolist()
    expected = [fitting(length, LENGTHS, LONGEST) for length in lengths]
    assert needed_lengths(dataset, LENGTHS, LONGEST, rows).tolist() == expected
    # a length holds an example that is just as long
    exact = (lengths[0], lengths[0] + 1)
    assert needed_lengths(dataset, exact, LONGEST, rows[:1]).tolist() == [lengths[0]]


def test_lengths_are_rounded_before_examples_are_sorted_by_them(dataset):
    """Examples that need rows of one length lie in a step as they were shuffled, not by their very lengths."""
    drawn, found = stream(dataset), []
    for _ in range(STEPS):
        step = drawn.draw(1)[0]
        found.append(example_lengths(dataset, drawn.order.shard_rows(step.samples)).tolist())
        drawn.advance_to(step.after)
    of_one_length = [each for each in found if {*map(bin_of, each)} == {bin_of(each[0])}]
    assert len(of_one_length) > 5
    assert any(each != sorted(each) for each in of_one_length)


def test_a_state_of_another_order_is_refused(dataset):
    saved = stream(dataset).state()
    with pytest.raises(DataError, match="length_order"):
        stream(dataset).restore(saved | {"length_order": 1})


def test_what_is_cut_off_is_padding_alone(dataset):
    for [batch] in steps_of(dataset):
        sample = stream(dataset)
        rows = sample.order.sources[0].order.shard_rows_at(batch.samples_B3.numpy())
        whole = sample.order.sources[0].sampler.make(batch.samples_B3.numpy(), rows, BATCH)
        length = batch.documents.shape[1]
        for name, array in whole.inputs.items():
            expected = torch.from_numpy(array)
            assert torch.equal(batch.inputs[name], expected[:, :length] if name.endswith("_BT") else expected)
        assert (whole.inputs["segments_BT"][:, length:] == 1).all()


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 2), (2, 2), (3, 1)])
def test_every_world_sees_the_same_samples_in_rows_of_one_length(dataset, data_size, micro_batch_size):
    for [one], several in zip(steps_of(dataset), steps_of(dataset, data_size, micro_batch_size), strict=True):
        assert {batch.documents.shape[1] for batch in several} == {one.documents.shape[1]}
        found = {tuple(row) for batch in several for row in batch.samples_B3.tolist()} - {(-1, -1, -1)}
        assert found == {tuple(row) for row in one.samples_B3.tolist()}


def test_a_rank_that_reads_nothing_knows_the_length_and_a_restart_goes_on(dataset):
    lengths = [batch.documents.shape[1] for [batch] in steps_of(dataset)]
    skipping = stream(dataset)
    for number, length in enumerate(lengths):
        step = skipping.draw(1)[0]
        assert skipping.row_length(step.samples) == length
        skipping.advance_to(step.after)
        if number == 17:
            state, skipping = skipping.state(), stream(dataset)
            skipping.restore(state)


def test_validation_samples_come_by_length_and_each_once(dataset):
    samples = ValidationSamples(dataset, LONGEST, "document", None, "concatenate", OBJECTIVE, LENGTHS)
    numbers = np.concatenate(samples.numbers(0, 1, 4))
    assert sorted(numbers.tolist()) == list(range(101))
    rows = np.concatenate([[(shard, row) for row in range(dataset.index.shards[shard].num_documents)]
                           for shard in range(dataset.num_shards)])  # fmt: skip
    lengths = example_lengths(dataset, rows)
    assert (np.diff(lengths[numbers]) >= 0).all()
    for place, batch in enumerate(samples.batches(0, 1, 4)):
        given = (batch.inputs["segments_BT"] == 0).sum(1)[: len(numbers[4 * place : 4 * place + 4])]
        assert given.tolist() == lengths[numbers[4 * place : 4 * place + 4]].tolist()
        assert samples.row_length(4 * place, 4 * place + 4) == fitting(int(given.max()), LENGTHS, LONGEST)
