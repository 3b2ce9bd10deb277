"""The cost of a whole run against its steps one by one."""

from pathlib import Path

import pytest

from engine.config.load import load_run
from engine.config.resolve import resolve
from engine.config.schema.run import RunConfig
from engine.plan.cost import STORAGE_BYTES_PER_SECOND, Cost, checkpoint_bytes, run_cost
from engine.plan.hardware import cluster
from engine.plan.plan import make_plan, run_stage_plans
from engine.plan.ranking import advise
from engine.plan.time import mean_step_time

RUN = Path(__file__).parents[3] / "configs" / "runs" / "gpt2-124m.yaml"
SHORT = ["stages.0.duration={steps: 100}", "stages.0.schedule={}", "checkpoint.every_steps=30", "evaluation={}"]


def cost(*overrides: str, world: int = 8) -> tuple[RunConfig, Cost]:
    run = load_run(RUN, [*SHORT, *overrides])
    return run, run_cost(run, resolve(run, world), cluster("h100-80gb", world, 8))


def seconds_of(run: RunConfig, world: int = 8) -> float:
    layout = resolve(run, world)
    return mean_step_time(run, layout, run_stage_plans(run, layout), cluster("h100-80gb", world, 8)).total


def test_a_constant_batch_costs_steps_times_a_step() -> None:
    run, found = cost()
    assert (found.steps, found.tokens) == (100, 100 * 512 * 1024)
    assert found.training_seconds == pytest.approx(100 * seconds_of(run))
    assert found.gpu_hours == pytest.approx(8 * found.seconds / 3600)


@pytest.mark.parametrize("sizes", [(128, 512), (512, 128)], ids=["rising", "falling"])
def test_a_ramp_costs_what_its_steps_do(sizes: tuple[int, int]) -> None:
    first, then = sizes
    ramp = f"stages.0.batch_ramp=[{{size: {first}, until_step: 40}}]"
    run, found = cost(ramp, f"stages.0.global_batch_size={then}")
    expected = sum(
        count * seconds_of(load_run(RUN, [*SHORT, f"stages.0.global_batch_size={size}"]))
        for count, size in ((40, first), (60, then))
    )
    assert found.training_seconds == pytest.approx(expected)
    assert found.tokens == (40 * first + 60 * then) * 1024
    largest = make_plan(load_run(RUN, [*SHORT]), 8)
    plan = make_plan(run, 8)
    (planned,), (expected,) = plan.run_stages, largest.run_stages
    assert (planned.tokens, planned.num_micro_batches) == (expected.tokens, expected.num_micro_batches)
    assert [stage.operations for stage in plan.stages] == [stage.operations for stage in largest.stages]
    assert [stage.traffic for stage in plan.stages] == [stage.traffic for stage in largest.stages]
    assert seconds_of(run) == pytest.approx(seconds_of(load_run(RUN, SHORT)))


def test_checkpoints_are_counted_and_weighed() -> None:
    """After 30, 60, 90 and 100 steps; weights and moments in fp32 of every real parameter, the tied one once."""
    _, found = cost()
    assert found.checkpoints == 4
    assert found.kept_checkpoints == 2
    assert found.checkpoint_bytes == 124_439_808 * 12
    share = -(-124_475_904 // 8) * 12
    assert found.checkpoint_seconds == pytest.approx(
        share / cluster("h100-80gb", 8, 8).accelerator.host_link_bytes_per_second + 8 * share / STORAGE_BYTES_PER_SECOND
    )
    assert found.held_up_seconds < found.checkpoint_seconds
    _, waiting = cost("checkpoint.asynchronous=false", "checkpoint.keep_every=30", "checkpoint.keep_last=1")
    assert waiting.held_up_seconds == waiting.checkpoint_seconds
    assert waiting.kept_checkpoints == 4
    assert waiting.seconds > found.seconds


def test_a_checkpoint_of_muon_has_one_moment_of_a_matrix() -> None:
    run = load_run(RUN, [*SHORT, "optimizer.name=muon"])
    assert checkpoint_bytes(run) == 124_439_808 * 12 - 12 * 12 * 768 * 768 * 4


def test_a_pipeline_stores_a_tied_matrix_once() -> None:
    _, found = cost("parallel.pipe=2")
    assert found.checkpoint_bytes == 124_439_808 * 12


def test_evaluations_count_where_their_samples_are_known() -> None:
    assert cost()[1].evaluation_seconds is None
    _, found = cost("evaluation={every_steps: 25, max_samples: 512}")
    assert found.evaluations == 4
    assert 0 < (found.evaluation_seconds or 0) < 4 * found.training_seconds / 100 / 2.5, "forward alone"
    _, without = cost("stages.0.data.validation=null")
    assert (without.evaluations, without.evaluation_seconds) == (0, 0.0)


def test_the_keys_of_a_layout_make_that_layout() -> None:
    run = load_run(RUN, ["parallel.recompute=full", "parallel.zero_stage=3", "parallel.gather=step"])
    for candidate in advise(run, make_plan(run, 8), cluster("h100-80gb", 8, 8)).ranked:
        keys = candidate.keys(run)
        assert {"pipe", "tensor", "zero_stage", "micro_batch_size"} <= keys.keys()
        pasted = run.model_copy(update={"parallel": run.parallel.model_copy(update=keys)})
        assert resolve(pasted, 8) == candidate.layout
        assert pasted.parallel == candidate.parallel.model_copy(update={"data": None})


def test_muon_pays_for_its_products_and_exchanges() -> None:
    """Per layer, in units of D cubed: five iterations of two products with each matrix and one of its Gram matrix, for
    query, key and value together, output, up and down. Eight owners share them."""
    adam, muon = (load_run(RUN, [*SHORT, f"optimizer.name={name}"]) for name in ("adamw", "muon"))
    (stage,) = run_stage_plans(muon, resolve(muon, 8))[0].stages
    longs = (3, 1, 4, 4)
    assert stage.update_operations == 12 * 768**3 * sum(5 * (4 * long + 2) for long in longs) // 8
    assert run_stage_plans(adam, resolve(adam, 8))[0].stages[0].update_operations == 0
    times = [
        mean_step_time(run, resolve(run, 8), run_stage_plans(run, resolve(run, 8)), cluster("h100-80gb", 8, 8))
        for run in (adam, muon)
    ]
    link = cluster("h100-80gb", 8, 8).accelerator.link_bytes_per_second
    products = stage.update_operations / (989e12 * 0.60 * 768 / (768 + 400))
    assert times[1].optimizer - times[0].optimizer == pytest.approx(products + stage.traffic.updates / link)
    assert times[1].data == times[0].data
