"""Schedules against a discrete-event simulation: no deadlock, the activation bound, the bubble of the formula."""

from __future__ import annotations

import itertools

import pytest

from engine.parallel.schedule import Backward, Forward, Instruction, Schedule, instructions

SIZES = list(itertools.product((1, 2, 3, 4, 5), (1, 2, 3, 4, 7, 8)))


def simulate(schedule: Schedule, num_stages: int, num_micro_batches: int, forward: int = 1, backward: int = 2):
    """Time at which each instruction ends when a stage waits for its input; raises where nobody can go on."""
    queues = [list(instructions(schedule, stage, num_stages, num_micro_batches)) for stage in range(num_stages)]
    ends: dict[tuple[int, Instruction], int] = {}
    clock = [0] * num_stages
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            needs = needed_by(stage, queue[0], num_stages)
            if all(need in ends for need in needs):
                ready = max([clock[stage], *(ends[need] for need in needs)])
                cost = forward if isinstance(queue[0], Forward) else backward
                clock[stage] = ends[(stage, queue.pop(0))] = ready + cost
                moved = True
        assert moved, "deadlock"
    return ends, max(clock)


def needed_by(stage: int, instruction: Instruction, num_stages: int) -> list[tuple[int, Instruction]]:
    match instruction:
        case Forward():
            return [(stage - 1, instruction)] if stage else []
        case Backward(chunk=chunk, micro_batch=micro_batch):
            own: list[tuple[int, Instruction]] = [(stage, Forward(chunk, micro_batch))]
            return own if stage == num_stages - 1 else [*own, (stage + 1, instruction)]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_every_micro_batch_once_and_no_deadlock(schedule, num_stages, num_micro_batches):
    ends, _ = simulate(schedule, num_stages, num_micro_batches)
    assert len(ends) == 2 * num_stages * num_micro_batches


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_bubble_is_the_formula(schedule, num_stages, num_micro_batches):
    """Each stage idles for (p - 1)(T_F + T_B): the share (p - 1) / (m + p - 1) of the step (Narayanan et al. 2021)."""
    _, length = simulate(schedule, num_stages, num_micro_batches)
    assert length == (num_micro_batches + num_stages - 1) * 3


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_1f1b_keeps_at_most_as_many_activations_as_stages_remain(num_stages, num_micro_batches):
    for stage in range(num_stages):
        live = most = 0
        for instruction in instructions("1f1b", stage, num_stages, num_micro_batches):
            live += 1 if isinstance(instruction, Forward) else -1
            most = max(most, live)
        assert most == min(num_stages - stage, num_micro_batches)
        assert live == 0


def test_gpipe_runs_all_forwards_first():
    kinds = [type(instruction) for instruction in instructions("gpipe", 0, 2, 3)]
    assert kinds == [Forward] * 3 + [Backward] * 3
