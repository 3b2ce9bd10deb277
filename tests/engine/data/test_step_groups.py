"""Steps that are drawn together are those drawn one by one: samples, cursors, and the rows of each rank."""

import random
from fractions import Fraction

import numpy as np
import pytest

from engine.config.batch_ramp import Ramp
from engine.config.schema.data import PackingName
from engine.data.mixed_order import Cursor, Samples
from engine.data.shards.damage import Damage
from engine.data.shards.dataset import TokenDataset
from engine.data.shares import ShareTable
from engine.data.source import WeightedDataset
from engine.data.step_groups import StepGroup, StepGroups
from engine.data.stream import Step, Stream
from engine.errors import DataError
from tests.engine.data.corpus import made_up_documents, write_shards

LENGTH = 16
RATIOS = ((0, Fraction(1, 10)), (9, Fraction("0.37")), (20, Fraction(0)), (23, Fraction(1, 2)))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("groups")
    # of very different sizes, so that windows end at different steps
    documents = [made_up_documents(count, longest, seed=count) for count, longest in ((200, 90), (40, 30), (90, 60))]
    return [write_shards(folder / str(number), found, 300) for number, found in enumerate(documents)]


def some_stream(datasets: list[TokenDataset], draw: random.Random) -> Stream:
    """A stream of one to three sources, with or without replay, limits, a ramp, and packing by best fit."""
    count = draw.randint(1, 3)
    replays = count > 1 and draw.random() < 0.7
    limits = [draw.choice([None, None, draw.randint(50, 900)]) for _ in range(count - replays)]
    parts = [WeightedDataset(found, f"s{k}" * (count > 1)) for k, found in enumerate(datasets[:count])]
    parts = [
        WeightedDataset(part.dataset, part.name, max_samples=limits[k] if k < len(limits) else None)
        for k, part in enumerate(parts)
    ]
    weights = tuple(draw.randint(1, 5) for _ in range(count - replays))
    table = ShareTable(((0, weights), (draw.randint(1, 15), weights[::-1])), RATIOS if replays else None)
    batches = draw.choice([Ramp((draw.randint(1, 20),)), Ramp((3, 8, 5), (0, 4, 17))])
    packing: PackingName = draw.choice(("concatenate", "best_fit"))
    return Stream(parts, LENGTH, batches, draw.randint(0, 9), draw.randint(1, 4), "document", packing, table=table)


def change(stream: Stream, draw: random.Random) -> None:
    """Leave samples out, or lose a shard, as a run may between two steps."""
    if draw.random() < 0.5:
        first = stream.position + draw.randint(0, 60)
        stream.leave_out(first, first + draw.randint(1, 40))
    else:
        stream.lose(Damage(draw.randrange(len(stream.parts)), draw.randint(0, 1), counted=True))


def drawn_alone(stream: Stream, cursor: Cursor, samples: int) -> tuple[Samples, Cursor]:
    """The next step, drawn by itself: its size follows from the samples before it."""
    return stream.order.take(cursor, stream.batches.size(stream.batches.steps(samples)))


def check_equal(step: Step, alone: tuple[Samples, Cursor]) -> None:
    samples, cursor = alone
    assert np.array_equal(step.samples.sources_N, samples.sources_N)
    assert np.array_equal(step.samples.addresses_N3, samples.addresses_N3)
    assert step.after.cursor == cursor
    assert step.after.samples == step.before.samples + samples.size


@pytest.mark.parametrize("seed", range(40))
def test_steps_drawn_together_are_those_drawn_alone(datasets, seed):
    draw = random.Random(seed)
    stream = some_stream(datasets, draw)
    for turn in range(30):
        if turn % 10 == 9 and seed % 2:
            change(stream, draw)
        cursor, samples = stream.progress.cursor, stream.samples
        try:
            alone = drawn_alone(stream, cursor, samples)
        except DataError as error:  # the data ends
            with pytest.raises(DataError, match=str(error).split(":")[0]):
                stream.draw(8)
            return
        steps = stream.draw(draw.randint(1, 40))
        for number, step in enumerate(steps):
            check_equal(step, alone if number == 0 else drawn_alone(stream, cursor, samples))
            assert step.before.cursor == cursor
            cursor, samples = step.after.cursor, step.after.samples
        # no step beside one that leaves a window of a source
        windows = {tuple(step.after.cursor.windows) for step in steps}
        assert len(steps) == 1 or windows == {tuple(stream.progress.cursor.windows)}
        stream.advance_to(draw.choice(steps).after)


@pytest.mark.parametrize(("data_rank", "data_size", "micro_batch"), [(0, 1, 1), (0, 1, 4), (1, 2, 3), (2, 3, 2)])
def test_a_group_has_the_rows_of_its_rank(datasets, data_rank, data_size, micro_batch):
    draw = random.Random(data_size)
    for _ in range(8):
        stream, groups = some_stream(datasets, draw), StepGroups()
        for turn in range(12):
            if turn == 6:
                change(stream, draw)
            try:
                most = draw.choice([1, 4, 8])
                group = groups.next(stream, (data_rank, data_size, micro_batch), most, ahead=draw.random() < 0.7)
            except DataError:
                break
            assert len(group.steps) <= most
            check_rows(stream, group, data_rank, data_size, micro_batch)
            stream.advance_to(group.steps[-1].after)


def check_rows(stream: Stream, group: StepGroup, data_rank: int, data_size: int, micro_batch: int) -> None:
    """Compare a group's rows with those that are dealt out one by one."""
    assert group.steps[0].before == stream.progress
    cursor, samples, row = stream.progress.cursor, stream.samples, 0
    for step, num_batches in zip(group.steps, group.num_batches, strict=True):
        alone = drawn_alone(stream, cursor, samples)
        check_equal(step, alone)
        mine = alone[0].at(
            np.array([j // micro_batch % data_size == data_rank for j in range(alone[0].size)], dtype=bool)
        )
        found = group.mine.at(slice(row, row + mine.size))
        assert np.array_equal(found.addresses_N3, mine.addresses_N3)
        assert np.array_equal(group.shard_rows_N2[row : row + mine.size], stream.order.shard_rows(mine))
        assert num_batches == -(-alone[0].size // (data_size * micro_batch))
        cursor, samples, row = alone[1], samples + alone[0].size, row + mine.size
    assert row == group.mine.size
