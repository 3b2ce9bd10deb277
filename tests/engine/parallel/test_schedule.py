"""Schedules against simulations: each pass once, no deadlock, what is alive, and idle time as the formulas have it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from engine.parallel.schedule import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Schedule,
    forward_only,
    instructions,
)
from engine.plan.pipeline import bubble, in_flight
from tests.engine.parallel.events import rendezvous, timeline

STAGES, MICRO_BATCHES = (1, 2, 3, 4, 5), range(1, 12)
SHAPES: list[tuple[Schedule, int, int]] = [
    *(("gpipe", num_stages, 1) for num_stages in STAGES),
    *(("1f1b", num_stages, 1) for num_stages in STAGES),
    *(("1f1b", num_stages, num_chunks) for num_stages in STAGES[1:] for num_chunks in (2, 3, 4)),
]
"""(schedule, stages, chunks): fewer micro-batches than stages, and numbers that they do not divide, are among them."""


def orders(schedule: Schedule, num_stages: int, num_chunks: int, num_micro_batches: int) -> list[list[Instruction]]:
    return [
        list(instructions(schedule, stage, num_stages, num_chunks, num_micro_batches)) for stage in range(num_stages)
    ]


def cost(instruction: Instruction) -> int:
    return 1 if isinstance(instruction, Forward) else 2


def alive(order: list[Instruction]) -> int:
    """The most forward passes that are not yet backward."""
    steps = (1 if isinstance(instruction, Forward) else -1 for instruction in order)
    return max(itertools.accumulate(steps))


@pytest.mark.parametrize(("schedule", "num_stages", "num_chunks"), SHAPES)
def test_every_pass_once_and_backward_after_forward(schedule, num_stages, num_chunks):
    for num_micro_batches in MICRO_BATCHES:
        for order in orders(schedule, num_stages, num_chunks, num_micro_batches):
            passes = list(itertools.product(range(num_chunks), range(num_micro_batches)))
            assert sorted((i.chunk, i.micro_batch) for i in order if isinstance(i, Forward)) == passes
            assert sorted((i.chunk, i.micro_batch) for i in order if isinstance(i, Backward)) == passes
            for one in passes:
                assert order.index(Forward(*one)) < order.index(Backward(*one))


@pytest.mark.parametrize(("schedule", "num_stages", "num_chunks"), SHAPES)
def test_what_is_sent_is_received_and_nobody_waits_for_ever(schedule, num_stages, num_chunks):
    for num_micro_batches in MICRO_BATCHES:
        made = orders(schedule, num_stages, num_chunks, num_micro_batches)
        timeline(made, num_chunks, cost)
        rendezvous(made, num_chunks)
        evaluation = [list(forward_only(num_stages, num_chunks, num_micro_batches)) for _ in range(num_stages)]
        timeline(evaluation, num_chunks, cost)
        rendezvous(evaluation, num_chunks)


@pytest.mark.parametrize(("schedule", "num_stages", "num_chunks"), SHAPES)
def test_idle_time_and_what_is_alive_are_the_plans(schedule, num_stages, num_chunks):
    """Equal where the micro-batches fill the schedule; else the plan's figures are bounds."""
    for num_micro_batches in MICRO_BATCHES:
        made = orders(schedule, num_stages, num_chunks, num_micro_batches)
        length = timeline(made, num_chunks, cost).length
        idle = 1 - Fraction(3 * num_chunks * num_micro_batches, length)
        peaks = [alive(order) for order in made]
        planned = [in_flight(schedule, stage, num_stages, num_chunks, num_micro_batches) for stage in range(num_stages)]
        if num_chunks == 1 or num_micro_batches % num_stages == 0:
            assert idle == bubble(schedule, num_stages, num_chunks, num_micro_batches)
            assert peaks == planned
        else:
            assert idle <= bubble(schedule, num_stages, num_chunks, num_micro_batches)
            assert all(peak <= most for peak, most in zip(peaks, planned, strict=True))


def test_gpipe_runs_all_forwards_first():
    kinds = [type(instruction) for instruction in instructions("gpipe", 0, 2, 1, 3)]
    assert kinds == [Forward] * 3 + [Backward] * 3


def test_interleaving_divides_the_idle_time_by_the_chunks():
    """Narayanan et al. 2021, section 2.2: idle over busy time is (p - 1) / (v m)."""
    for num_chunks in (1, 2, 4):
        share = bubble("1f1b", 4, num_chunks, 8)
        assert share / (1 - share) == Fraction(3, 8 * num_chunks)


@pytest.mark.parametrize("num_stages", STAGES)
@pytest.mark.parametrize("times", [(1, 1, 1), (2, 3, 1), (3, 2, 2), (4, 5, 3)])
def test_zb_h1_waits_less_and_holds_no_more_than_1f1b(num_stages: int, times: tuple[int, int, int]):
    """(p - 1)(T_F + T_B - T_W), where T_W is not the longest (Qi et al. 2023, table 1); p micro-batches at most."""
    forward, backward_input, backward_weight = times
    cost = {Forward: forward, BackwardInput: backward_input, BackwardWeight: backward_weight}
    for num_micro_batches in MICRO_BATCHES:
        made = orders("zb-h1", num_stages, 1, num_micro_batches)
        for order in made:
            for number in range(num_micro_batches):
                parts = [order.index(kind(0, number)) for kind in (Forward, BackwardInput, BackwardWeight)]
                assert parts == sorted(parts)
            assert len(order) == 3 * num_micro_batches
            held = itertools.accumulate({Forward: 1, BackwardWeight: -1}.get(type(one), 0) for one in order)
            assert max(held) == in_flight("zb-h1", 0, num_stages, 1, num_micro_batches) <= num_stages
        rendezvous(made, 1)
        length = timeline(made, 1, lambda instruction: cost[type(instruction)]).length
        idle = length - num_micro_batches * sum(times)
        filled = min(num_micro_batches, num_stages)
        assert idle == (num_stages - 1) * (forward + backward_input) - (filled - 1) * backward_weight
        if filled == num_stages:
            assert idle == (num_stages - 1) * (forward + backward_input - backward_weight)
        if times == (1, 1, 1):
            assert Fraction(idle, length) == bubble("zb-h1", num_stages, 1, num_micro_batches)


def test_the_simulations_see_a_wrong_order():
    made = orders("1f1b", 2, 2, 2)
    crossed = [list(reversed(made[0])), made[1]]
    with pytest.raises(AssertionError, match="deadlock"):
        timeline(crossed, 2, cost)
    with pytest.raises(AssertionError, match="deadlock"):
        rendezvous(crossed, 2)
    swapped = [made[0], [made[1][1], made[1][0], *made[1][2:]]]
    with pytest.raises(AssertionError, match="in the place of"):
        timeline(swapped, 2, cost)
