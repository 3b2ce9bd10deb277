import math

import pytest

from engine.config.schema import ScheduleConfig
from engine.optim.schedules import factor


def factors(num_steps: int, **keys) -> list[float]:
    return [factor(ScheduleConfig(**keys), step, num_steps) for step in range(num_steps)]


def test_warmup_is_linear_and_reaches_one():
    assert factors(8, warmup_steps=4, shape="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_ends_at_the_final_factor():
    assert factors(5, warmup_steps=1, shape="linear", final_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_the_closed_form():
    found = factors(10, warmup_steps=2, shape="cosine", final_factor=0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(1, 9)]
    assert found == pytest.approx([0.5, 1.0, *expected])
    assert found[-1] == pytest.approx(0.1)


def test_decay_steps_end_the_decay_before_the_stage_does():
    found = factors(10, warmup_steps=0, shape="linear", decay_steps=4, final_factor=0.5)
    assert found[3:] == pytest.approx([0.5] * 7)


def test_no_step_is_without_learning_rate():
    assert min(factors(3, warmup_steps=3)) > 0
