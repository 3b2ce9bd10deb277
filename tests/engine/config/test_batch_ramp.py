"""Steps, samples and tokens of a ramp against counting one step after another."""

import itertools

import pytest

from engine.config.batch_ramp import Ramp, make_ramp

RAMPS = [
    Ramp((5,)),
    Ramp((2, 3), (0, 1)),
    Ramp((4, 8, 6), (0, 3, 5)),
    make_ramp([(2, 0, 7), (4, 6, 0)], 10),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_samples_and_steps_are_what_counting_gives(ramp):
    total = 0
    for step in range(20):
        assert ramp.samples(step) == total
        assert ramp.steps(total) == step
        for inside in range(1, ramp.size(step) + 1):
            assert ramp.steps(total + inside) == step + 1
        total += ramp.size(step)


def test_a_size_ends_before_the_first_step_that_begins_with_the_samples_consumed():
    ramp = RAMPS[3]
    assert [ramp.size(step) for step in range(8)] == [2, 2, 2, 2, 4, 4, 10, 10]
    assert list(itertools.accumulate(ramp.size(step) for step in range(4))) == [2, 4, 6, 8]  # 7 are consumed after 4


def test_the_largest_size_is_not_always_the_last():
    assert RAMPS[2].largest == 8


def test_a_step_and_a_number_of_samples_are_both_waited_for():
    assert make_ramp([(2, 3, 10)], 4).first_steps == (0, 5)
    assert make_ramp([(2, 7, 10)], 4).first_steps == (0, 7)
