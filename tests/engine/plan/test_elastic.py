"""Worlds to go on in, against brute force over the rules and over rows dealt out by hand."""

import pytest

from engine.config.load import apply_override, parse_run
from engine.config.resolve import examine, num_micro_batches, resolve
from engine.config.schema.run import RunConfig
from engine.data.step_groups import micro_batch_rows
from engine.plan.composition import example
from engine.plan.elastic import World, elastic_worlds
from engine.plan.shrink import world_for
from engine.plan.worlds import with_parallel

BATCH = 24


def run(micro_batch_size: int = 1, pad_batch: bool = False, layout: str = "data", **parallel: int | str) -> RunConfig:
    config = example({"parallel": {"micro_batch_size": micro_batch_size, **parallel}})
    elastic = config.elastic.model_copy(update={"pad_batch": pad_batch, "layout": layout})
    return config.model_copy(update={"elastic": elastic})


def shapes(worlds: list[World]) -> list[tuple[int, int, int]]:
    return [(world.layout.data, world.parallel.micro_batch_size, world.padded_rows) for world in worlds]


def test_micro_batch_times_accumulation_times_data_is_the_global_batch() -> None:
    """24 samples: a world is valid where its data size divides them, with the largest micro-batch up to 4."""
    assert shapes(elastic_worlds(run(4), 64)) == [
        (1, 4, 0), (2, 4, 0), (3, 4, 0), (4, 3, 0), (6, 4, 0), (8, 3, 0), (12, 2, 0), (24, 1, 0)
    ]  # fmt: skip
    assert [world.size for world in elastic_worlds(run(4, pipe=2, tensor=2), 40)] == [4, 8, 12, 16, 24, 32]


@pytest.mark.parametrize("pad_batch", [False, True])
@pytest.mark.parametrize("micro_batch_size", range(1, 8))
def test_worlds_are_those_that_the_rules_let_pass(micro_batch_size: int, pad_batch: bool) -> None:
    """Every (data, micro-batch) tried by hand; of those that start the one that pads least, then the largest."""
    config = run(micro_batch_size, pad_batch)
    expected = []
    for data in range(1, 31):
        starting = []
        for smaller in range(1, micro_batch_size + 1):
            tried = with_parallel(config, data=data, micro_batch_size=smaller)
            if not examine(tried, data)[1]:
                rows = num_micro_batches(BATCH, tried.parallel, data) * smaller * data
                starting.append((rows - BATCH, -smaller))
        if starting:
            padded, smaller = min(starting)
            expected.append((data, -smaller, padded))
    assert shapes(elastic_worlds(config, 30)) == expected
    assert (len(expected) == 24) == pad_batch


@pytest.mark.parametrize("data", range(1, 25))
def test_padding_deals_out_every_sample_once_in_micro_batches_of_one_number(data: int) -> None:
    config = with_parallel(run(4, pad_batch=True), data=data)
    dealt = [micro_batch_rows(BATCH, data_rank, data, 4) for data_rank in range(data)]
    assert {len(batches) for batches in dealt} == {num_micro_batches(BATCH, config.parallel, data)}
    assert sorted(int(row) for batches in dealt for rows in batches for row in rows) == list(range(BATCH))


def test_every_size_of_a_ramp_has_to_fit() -> None:
    config = run(4)
    tree = config.model_dump(mode="json")
    tree["stages"][0]["batch_ramp"] = [{"size": 16, "until_step": 5}]
    ramped = parse_run(tree, "ramp")
    assert shapes(elastic_worlds(ramped, 30)) == [(1, 4, 0), (2, 4, 0), (4, 2, 0), (8, 1, 0)]


def test_a_world_says_how_to_start_there() -> None:
    config = run(4, data=8)
    (world,) = [world for world in elastic_worlds(config, 12) if world.size == 12]
    assert world.overrides(config) == ["parallel.data=12", "parallel.micro_batch_size=2"]
    tree = config.model_dump(mode="json")
    for override in world.overrides(config):
        apply_override(tree, override)
    assert resolve(parse_run(tree, "overridden"), 12) == world.layout


def test_what_another_layout_gives_up_is_said_in_words_that_a_run_file_knows() -> None:
    config = run(2, zero_stage=3, gather="step", sequence_parallel=True, tensor=2)
    plain = with_parallel(config, gather=None, sequence_parallel=False, tensor=1)
    world = World(plain.parallel, resolve(plain, 4), 0)
    tree = config.model_dump(mode="json")
    for override in world.overrides(config):
        apply_override(tree, override)
    assert parse_run(tree, "overridden").parallel == plain.parallel


def test_only_the_data_axis_shrinks_unless_any_may() -> None:
    """Seven ranks remain: pipe 2 leaves data 3; with any layout all seven are used where one divides the batch."""
    shrunk = world_for(run(2, pipe=2), 7)
    assert shrunk is not None
    assert (str(shrunk.layout), shrunk.size) == ("pipe 2 x data 3 x sequence 1 x tensor 1", 6)
    assert shrunk.parallel.zero_stage == 1
    assert world_for(run(2, pipe=4), 3) is None
    free = world_for(run(2, pipe=4, layout="any"), 3)
    assert free is not None
    assert free.size == 3
    assert resolve(with_parallel(run(), **free.parallel.model_dump()), 3) == free.layout


def test_more_data_ranks_than_samples_are_refused() -> None:
    problems = examine(run(pad_batch=True), 25)[1]
    assert str(problems[0]) == (
        "stages.0.global_batch_size = 24 leaves some of 25 data ranks without a sample\n"
        "  allowed: at most 24 data ranks\n"
        "  to do: start fewer ranks, or use more of them for parallel.pipe or parallel.tensor"
    )
