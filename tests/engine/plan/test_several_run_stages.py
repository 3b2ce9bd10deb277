"""Plans of runs of several run stages, held against plans of runs that have each of these stages alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.load import load_run, parse_run
from engine.config.objectives import row_lengths
from engine.config.resolve import Layout, examine
from engine.config.schema.parallel import ElasticConfig
from engine.config.schema.run import RunConfig
from engine.plan.composition import example
from engine.plan.cost import run_cost
from engine.plan.elastic import elastic_worlds
from engine.plan.hardware import cluster
from engine.plan.plan import make_plan, run_stage_plans
from engine.plan.ranking import judge, rank
from engine.plan.run_stages import cut_lengths, recomputed_layers
from engine.plan.worlds import valid_worlds, with_parallel

RUN = Path(__file__).parents[3] / "configs" / "runs" / "gpt2-124m.yaml"
MACHINE = cluster("h100-80gb", 8, 8)
OVERRIDES = [
    "checkpoint.every_steps=100",
    "evaluation={every_steps: 50, max_samples: 512}",
    "parallel.micro_batch_size=4",
]
STAGES = [
    {"name": "short", "sequence_length": 256, "global_batch_size": 512, "duration": {"steps": 300}},
    {"name": "long", "sequence_length": 1024, "global_batch_size": 256, "duration": {"tokens": 10 * 256 * 1024}},
    {
        "name": "ramped",
        "sequence_length": 512,
        "global_batch_size": 256,
        "batch_ramp": [{"size": 64, "until_step": 7}],
        "duration": {"steps": 15},
    },
]


def of(config: RunConfig, *stages: dict) -> RunConfig:
    """A run of such stages, each with the other keys of the configuration's first stage."""
    tree = config.model_dump(mode="json")
    first = tree["stages"][0] | {"schedule": {}, "batch_ramp": []}
    tree["stages"] = [first | stage for stage in stages]
    return parse_run(tree, "several")


def gpt(*stages: dict, **changes: object) -> RunConfig:
    config = of(load_run(RUN, OVERRIDES), *stages)
    return with_parallel(config, **changes) if changes else config


def layout_of(config: RunConfig, world_size: int = 8) -> Layout:
    layout, problems = examine(config, world_size)
    assert layout is not None
    assert problems == []
    return layout


def test_a_plan_has_the_figures_of_each_run_stage_alone_and_names_the_largest():
    plan = make_plan(gpt(*STAGES), 8)
    alone = [make_plan(gpt(stage), 8) for stage in STAGES]
    assert plan.run_stages == tuple(one.largest for one in alone)
    assert plan.largest.name == "long"
    assert plan.memory_bytes == max(one.memory_bytes for one in alone)
    assert plan.stages == alone[1].stages
    tree = plan.as_json()
    assert tree["largest_run_stage"] == "long"
    assert [one["memory_bytes"] for one in tree["run_stages"]] == [one.memory_bytes for one in alone]
    assert tree["tokens"] == 256 * 1024


def test_a_run_costs_the_sum_of_its_run_stages():
    """One layout without a pipeline, so nothing of a stage depends on its neighbours. Checkpoints and evaluations count
    in steps of the whole run: after 50, 100, ..., 300 of the first stage, at 310, and at 325."""
    whole = run_cost(gpt(*STAGES), layout_of(gpt(*STAGES)), MACHINE)
    alone = [run_cost(gpt(stage), layout_of(gpt(stage)), MACHINE) for stage in STAGES]
    assert [one.steps for one in whole.run_stages] == [300, 10, 15]
    assert whole.steps == 325
    assert whole.tokens == sum(one.tokens for one in alone)
    assert whole.training_seconds == pytest.approx(sum(one.training_seconds for one in alone), rel=1e-12)
    assert [one.evaluations for one in whole.run_stages] == [6, 1, 1]
    assert whole.evaluation_seconds == pytest.approx(sum(one.evaluation_seconds or 0.0 for one in alone), rel=1e-12)
    assert whole.checkpoints == 4
    assert whole.checkpoint_bytes == alone[0].checkpoint_bytes
    assert sum(one.seconds for one in whole.run_stages) < whole.seconds
    assert whole.as_json()["steps"] == 325


def test_a_run_whose_evaluations_are_not_known_says_so():
    config = of(load_run(RUN, ["evaluation={every_steps: 50}", "parallel.micro_batch_size=4"]), *STAGES)
    assert run_cost(config, layout_of(config), MACHINE).evaluation_seconds is None


def spans(config: RunConfig, *sizes: tuple[str, int, float]) -> RunConfig:
    """A run of span corruption whose decoder's rows differ: the head's share of the work moves the cut."""
    stages = [
        {
            "name": name,
            "sequence_length": length,
            "objective": {"name": "span_corruption", "rate": rate, "mean_span_length": 3.0},
        }
        for name, length, rate in sizes
    ]
    return of(config, *stages)


def chunks_of(config: RunConfig, layout: Layout) -> list[tuple[tuple[int, int], ...]]:
    """First and last layers of the chunks of every pipeline stage, which have to be equal in all run stages."""
    (found,) = {tuple(stage.chunks for stage in planned.stages) for planned in run_stage_plans(config, layout)}
    return list(found)


def t5() -> RunConfig:
    return load_run(RUN.with_name("t5-base.yaml"), ["parallel.micro_batch_size=1"])


@pytest.mark.parametrize("pipe", [2, 3, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_the_pipeline_is_cut_for_the_run_stage_that_needs_the_most_memory(pipe: int, order: int):
    """Rows that predict half of their tokens need more than others under every cut, so theirs is the cut of the run."""
    sizes = [("few", 512, 0.05), ("many", 512, 0.5), ("short", 64, 0.15)][::order]
    config = with_parallel(spans(t5(), *sizes), pipe=pipe)
    layout = layout_of(config, pipe)
    chunks = {size[0]: chunks_of(with_parallel(spans(t5(), size), pipe=pipe), layout) for size in sizes}
    assert chunks["few"] != chunks["many"], "else nothing is shown"
    assert chunks_of(config, layout) == chunks["many"]
    assert make_plan(config, pipe).largest.name == "many"
    (many,) = [stage for stage in config.stages if stage.name == "many"]
    assert cut_lengths(config, layout) == row_lengths(many)


def test_layers_recompute_as_far_as_the_most_demanding_run_stage_needs_it():
    activations = make_plan(gpt(STAGES[1]), 8).stages[0].memory.activations
    changes = {"recompute": "full", "activation_gib": 0.6 * activations / 2**30}
    config = gpt(*STAGES, **changes)
    layout = layout_of(config)
    alone = [len(recomputed_layers(gpt(stage, **changes), layout, 0, "cuda")) for stage in STAGES]
    assert max(alone) > min(alone)
    assert len(recomputed_layers(config, layout, 0, "cuda")) == max(alone)
    for planned in run_stage_plans(config, layout):
        assert planned.stages[0].recomputed == max(alone)
        assert planned.stages[0].memory.activations <= 0.6 * activations + 1


@pytest.mark.parametrize("pad_batch", [False, True])
def test_worlds_are_valid_for_every_batch_of_every_run_stage(pad_batch: bool):
    """Tried by hand: each (data, micro-batch) against every batch size of the run."""
    base = example({"parallel": {"micro_batch_size": 4}})
    base = base.model_copy(update={"elastic": ElasticConfig(pad_batch=pad_batch)})
    config = of(
        base,
        {"name": "first", "global_batch_size": 24},
        {"name": "second", "global_batch_size": 36, "batch_ramp": [{"size": 12, "until_step": 2}]},
    )
    sizes, largest = (24, 36, 12), (24, 36)
    expected = []
    for data in range(1, 50):
        tried = []
        for micro in (4, 3, 2, 1):
            rows = [-(-size // (micro * data)) * micro * data for size in sizes]
            if data <= min(sizes) and (pad_batch or rows == list(sizes)):
                padded = max(-(-size // (micro * data)) * micro * data - size for size in largest)
                tried.append((sum(rows), -micro, padded))
        if tried:
            _, micro, padded = min(tried)
            expected.append((data, -micro, padded))
    found = [(world.size, world.parallel.micro_batch_size, world.padded_rows) for world in elastic_worlds(config, 49)]
    assert found == expected
    as_it_is = with_parallel(config, micro_batch_size=2)
    valid = [
        data for data in range(1, 50) if (data <= 12 if pad_batch else all(size % (2 * data) == 0 for size in sizes))
    ]
    assert valid_worlds(as_it_is, 49) == valid


def test_layouts_are_ranked_by_the_steps_of_all_run_stages():
    """Without a pipeline nothing of a run stage depends on the others: the mean step is that of the stages alone."""
    config = gpt(*STAGES)
    steps = [300, 10, 15]
    ranked = rank(config, MACHINE)
    assert any(candidate.fits for candidate in ranked)
    for candidate in ranked:
        if candidate.layout.pipe > 1:
            continue
        changes = candidate.parallel.model_dump()
        alone = [judge(gpt(stage, **changes), candidate.layout, MACHINE) for stage in STAGES]
        total = sum(count * one.time.total for count, one in zip(steps, alone, strict=True))
        assert candidate.time.total == pytest.approx(total / sum(steps), rel=1e-12)
        assert candidate.memory_bytes == max(one.memory_bytes for one in alone)
        batches = [one for stage in config.stages for one in stage.batches.sizes]
        assert all(size % (candidate.layout.data * candidate.parallel.micro_batch_size) == 0 for size in batches)
    fitting = [candidate.time.total for candidate in ranked if candidate.fits]
    assert fitting == sorted(fitting)
