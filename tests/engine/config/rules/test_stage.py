"""Rules of batch ramps, schedules and stability: each one broken by itself."""

import pytest

from engine.config.resolve import examine
from engine.config.resume import compare
from tests.engine.config.run_config import config

SCHEDULE = "stages.0.schedule="
RAMP = "stages.0.batch_ramp="


def problems(*overrides: str, world_size: int = 1) -> list[tuple[str, str]]:
    return [(problem.wrong, problem.allowed) for problem in examine(config(*overrides), world_size)[1]]


@pytest.mark.parametrize(
    ("override", "wrong", "allowed"),
    [
        (
            SCHEDULE + "{shape: constant, decay: 3}",
            "stages.0.schedule.decay = 3 with stages.0.schedule.shape = constant, which has no use for it",
            "warmup",
        ),
        (
            SCHEDULE + "{shape: cosine, cooldown: 2}",
            "stages.0.schedule.cooldown = 2 with stages.0.schedule.shape = cosine, which has no use for it",
            "warmup, decay, final_factor",
        ),
        (
            SCHEDULE + "{shape: wsd, decay: 2, constant_factor: 0.3}",
            "stages.0.schedule.constant_factor = 0.3 with stages.0.schedule.shape = wsd, which has no use for it",
            "warmup, decay, final_factor",
        ),
        (
            SCHEDULE + "{shape: linear, initial_factor: 0.3}",
            "stages.0.schedule.initial_factor = 0.3 with stages.0.schedule.shape = linear, which has no use for it",
            "warmup, decay, final_factor",
        ),
        (
            SCHEDULE + "{shape: wsd}",
            "stages.0.schedule.decay = None with stages.0.schedule.shape = wsd",
            "a length in steps",
        ),
        (
            SCHEDULE + "{shape: infinite, decay: 2, final_factor: 0.0}",
            "stages.0.schedule.final_factor = 0: an exponential anneal does not reach it",
            "more than 0, for example 0.01",
        ),
        (
            SCHEDULE + "{shape: infinite, warmup: 4, cooldown: 4, decay: 3}",
            "stages.0.schedule: warmup 4 + cooldown 4 + decay 3 is more than the stage's 10 steps",
            "0 to 10 steps together",
        ),
        (
            SCHEDULE + "{unit: tokens, warmup: 15361}",
            "stages.0.schedule: warmup 15361 is more than the stage's 15360 tokens",
            "0 to 15360 tokens together",
        ),
        (
            RAMP + "[{size: 8}]",
            "stages.0.batch_ramp.0: 0 ends",
            "exactly one of until_step and until_tokens",
        ),
        (
            RAMP + "[{size: 8, until_step: 2, until_tokens: 9}]",
            "stages.0.batch_ramp.0: 2 ends",
            "exactly one of until_step and until_tokens",
        ),
        (
            RAMP + "[{size: 8, until_step: 3}, {size: 16, until_tokens: 64}]",
            "stages.0.batch_ramp.1 begins and ends at step 3",
            "sizes in order, each for one step or more",
        ),
        (
            "optimizer.momentum=0.9",
            "optimizer.momentum = 0.9 with optimizer.name = adamw, which has no use for it",
            "beta1 and beta2",
        ),
        (
            "stability={rollback_spikes: 2, spike_sigma: 6}",
            "stability.rollback_spikes = 2 without checkpoint.every_steps: there is nothing to go back to",
            "both, or neither",
        ),
    ],
)
def test_one_problem_at_a_time(override: str, wrong: str, allowed: str) -> None:
    assert problems(override) == [(wrong, allowed)]


@pytest.mark.parametrize(
    ("stability", "wrong"),
    [
        ("{rollback_spikes: 2}", "stability.rollback_spikes = 2 without stability.spike_sigma"),
        (
            "{rollback_spikes: 4, rollback_steps: 3, spike_sigma: 6}",
            "stability.rollback_spikes = 4 is never reached with stability.rollback_steps = 3 and "
            "stability.max_skips = 10",
        ),
        (
            "{rollback_spikes: 4, max_skips: 3, spike_sigma: 6}",
            "stability.rollback_spikes = 4 is never reached with stability.rollback_steps = 10 and "
            "stability.max_skips = 3",
        ),
    ],
)
def test_rollback_needs_spikes_that_can_happen(stability: str, wrong: str) -> None:
    assert [found for found, _ in problems(f"stability={stability}", "checkpoint.every_steps=5")] == [wrong]


def test_every_size_of_a_ramp_must_fit_the_world() -> None:
    ramp = RAMP + "[{size: 8, until_step: 2}, {size: 20, until_step: 4}]"
    assert problems(ramp, world_size=4) == []
    assert problems(ramp, world_size=8) == [
        (
            "stages.0.batch_ramp.1.size = 20 is no multiple of micro_batch_size 1 x data 8",
            "a multiple of 8",
        )
    ]


def test_what_may_be_written() -> None:
    assert problems(SCHEDULE + "{shape: infinite, warmup: 2, cooldown: 3, decay: 5}") == []
    assert problems(SCHEDULE + "{shape: cosine, warmup: 2, decay: 500}") == [], "a decay may end after the stage"
    assert problems(SCHEDULE + "{shape: rewarm, warmup: 2, initial_factor: 0.1}") == []
    assert problems("stability={rollback_spikes: 2, spike_sigma: 6}", "checkpoint.every_steps=5") == []


def test_a_ramp_is_of_the_meaning_of_a_run() -> None:
    changes = compare(config(RAMP + "[{size: 8, until_step: 2}]"), config(RAMP + "[{size: 8, until_step: 3}]"))
    assert [(change.key, change.kind) for change in changes] == [("stages.0.batch_ramp.0.until_step", "meaning")]


def test_a_length_in_tokens_counts_the_ramp_and_is_rounded_up() -> None:
    run = config(RAMP + "[{size: 8, until_step: 2}]", "stages.0.duration={tokens: 2562}")
    assert run.stages[0].num_steps == 4  # 8 + 8 + 24 = 40 samples = 2560 tokens are two too few
