"""Each shape against its closed form at every corner; the same schedule in steps and in tokens; a ramp between them."""

import math

import pytest

from engine.config.schema.stage import ScheduleConfig
from engine.optim.schedules import factor, factor_of_step, learning_rate
from tests.engine.config.run_config import config


def factors(num_steps: int, **keys) -> list[float]:
    return [factor(ScheduleConfig(**keys), step + 1, num_steps) for step in range(num_steps)]


def test_warmup_is_linear_and_reaches_one():
    assert factors(8, warmup=4, shape="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_ends_at_the_final_factor():
    assert factors(5, warmup=1, shape="linear", final_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_the_closed_form():
    found = factors(10, warmup=2, shape="cosine", final_factor=0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(1, 9)]
    assert found == pytest.approx([0.5, 1.0, *expected])
    assert found[-1] == pytest.approx(0.1)


def test_a_decay_may_end_before_the_stage_or_after_it():
    found = factors(10, shape="linear", decay=4, final_factor=0.5)
    assert found == pytest.approx([0.875, 0.75, 0.625] + [0.5] * 7)
    assert factors(2, warmup=1, shape="linear", decay=4, final_factor=0.0) == [1.0, 0.75]


def test_wsd_is_stable_and_decays_at_the_end():
    found = factors(10, warmup=2, shape="wsd", decay=4, final_factor=0.2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_wsd_without_a_stable_phase():
    assert factors(4, warmup=2, shape="wsd", decay=2, final_factor=0.5) == pytest.approx([0.5, 1.0, 0.75, 0.5])


def test_infinite_is_its_four_phases():
    found = factors(12, warmup=2, shape="infinite", cooldown=4, constant_factor=0.4, decay=3, final_factor=0.05)
    cooldown = [0.4 + 0.6 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    anneal = [0.4 * (0.05 / 0.4) ** (n / 3) for n in (1, 2, 3)]
    assert found == pytest.approx([0.5, 1.0, *cooldown, 0.4, 0.4, 0.4, *anneal])
    assert found[5] == pytest.approx(0.4)
    assert found[-1] == pytest.approx(0.05)


def test_infinite_does_not_depend_on_the_end_before_the_anneal():
    keys = {"warmup": 2, "shape": "infinite", "cooldown": 3, "constant_factor": 0.4, "decay": 3}
    assert factors(12, **keys)[:9] == factors(30, **keys)[:9]


def test_infinite_without_warmup_and_cooldown_goes_on_at_the_constant():
    found = factors(4, shape="infinite", constant_factor=0.5, decay=1, final_factor=0.25)
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.25])


def test_rewarm_begins_where_the_earlier_run_ended():
    found = factors(6, warmup=2, shape="rewarm", initial_factor=0.1, final_factor=0.1)
    down = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    assert found == pytest.approx([0.55, 1.0, *down])


SHAPES = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "wsd": {"decay": 3},
    "infinite": {"decay": 3, "cooldown": 2, "constant_factor": 0.5},
    "rewarm": {"initial_factor": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_corners_that_all_shapes_share(shape):
    schedule = ScheduleConfig(shape=shape, warmup=4, **SHAPES[shape])
    assert factor(schedule, 4, 12) == 1.0
    assert 0 < factor(schedule, 1, 12) < 1
    end = {"constant": 1.0}.get(shape, 0.1)
    assert factor(schedule, 12, 12) == pytest.approx(end)
    assert factor(schedule, 500, 12) == pytest.approx(end), "beyond the end it stays"
    cold = ScheduleConfig(shape=shape, **SHAPES[shape])
    assert 0.5 <= factor(cold, 1, 12) <= 1.0, "no warm-up, no small first step"
    assert all(0 < factor(cold, done, 12) <= 1 for done in range(1, 13))


@pytest.mark.parametrize("shape", ["linear", "cosine", "rewarm"])
def test_a_stage_that_is_all_warmup(shape):
    assert factors(3, shape=shape, warmup=3)[-1] == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_steps_times_their_tokens_while_the_batch_stays(shape):
    """24 samples of 64 tokens a step: the same lengths in either unit."""
    lengths = {"warmup": 2} | {key: value for key, value in SHAPES[shape].items() if key in ("decay", "cooldown")}
    others = {key: value for key, value in SHAPES[shape].items() if key not in lengths} | {"shape": shape}
    in_steps = config("stages.0.schedule=" + str(others | lengths)).stages[0]
    in_tokens = {key: value * 24 * 64 for key, value in lengths.items()} | {"unit": "tokens"}
    found = config("stages.0.schedule=" + str(others | in_tokens)).stages[0]
    expected = [factor_of_step(in_steps, step) for step in range(10)]
    assert [factor_of_step(found, step) for step in range(10)] == pytest.approx(expected)


RAMP = "stages.0.batch_ramp=[{size: 6, until_step: 2}, {size: 12, until_tokens: 1537}]"


def test_with_a_ramp_tokens_follow_the_batch():
    """1537 tokens are one more than the 24 samples of the first three steps: the size 24 waits for one step more."""
    keys = {"shape": "linear", "unit": "tokens", "warmup": 12 * 64, "final_factor": 0.0}
    run_stage = config(RAMP, f"stages.0.schedule={keys}", "stages.0.duration.steps=6").stages[0]
    sizes = [run_stage.batches.size(step) for step in range(6)]
    assert sizes == [6, 6, 12, 12, 24, 24]
    done = [sum(sizes[: step + 1]) for step in range(6)]
    expected = [0.5, 1.0, *(1 - (samples - 12) / (84 - 12) for samples in done[2:])]
    assert [factor_of_step(run_stage, step) for step in range(6)] == pytest.approx(expected)


def test_a_run_stage_may_have_a_peak_of_its_own():
    run = config("optimizer.learning_rate=1e-3", "stages.0.schedule.shape=constant")
    own = config("optimizer.learning_rate=1e-3", "stages.0.schedule={shape: constant, learning_rate: 4e-4}")
    assert learning_rate(run.optimizer, run.stages[0], 3) == 1e-3
    assert learning_rate(own.optimizer, own.stages[0], 3) == 4e-4
