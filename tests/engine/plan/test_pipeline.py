"""Idle time and micro-batches alive, against a simulation that knows no formula."""

from fractions import Fraction

import pytest

from engine.plan.pipeline import bubble, in_flight

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 8), (4, 2), (4, 4), (4, 8), (3, 7)]


def orders(schedule: str, stage: int, pipe: int, micro_batches: int) -> list[tuple[str, int]]:
    """Forward and backward passes of one stage in order, straight from the definitions of the schedules."""
    forward = [("F", i) for i in range(micro_batches)]
    backward = [("B", i) for i in range(micro_batches)]
    warm_up = micro_batches if schedule == "gpipe" else min(pipe - stage, micro_batches)
    steady = [one for pair in zip(backward, forward[warm_up:], strict=False) for one in pair]
    return forward[:warm_up] + steady + backward[micro_batches - warm_up :]


def simulate(schedule: str, pipe: int, micro_batches: int) -> tuple[Fraction, list[int]]:
    """(idle share, peak of live micro-batches per stage), a forward taking 1 and a backward 2."""
    waiting = [orders(schedule, stage, pipe, micro_batches) for stage in range(pipe)]
    free_at, alive, peak = [0] * pipe, [0] * pipe, [0] * pipe
    done: dict[tuple[str, int, int], int] = {}
    while any(waiting):
        for stage in range(pipe):
            if not waiting[stage]:
                continue
            kind, number = waiting[stage][0]
            needs = [(kind, stage - 1 if kind == "F" else stage + 1, number)]
            if kind == "B":
                needs.append(("F", stage, number))
            needs = [need for need in needs if 0 <= need[1] < pipe]
            if not all(need in done for need in needs):
                continue
            start = max([free_at[stage], *(done[need] for need in needs)])
            free_at[stage] = done[kind, stage, number] = start + (1 if kind == "F" else 2)
            alive[stage] += 1 if kind == "F" else -1
            peak[stage] = max(peak[stage], alive[stage])
            waiting[stage].pop(0)
    return 1 - Fraction(3 * micro_batches, max(free_at)), peak


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("pipe", "micro_batches"), SHAPES)
def test_formulas_against_a_simulation(schedule, pipe: int, micro_batches: int) -> None:
    idle, peak = simulate(schedule, pipe, micro_batches)
    assert bubble(pipe, micro_batches) == idle
    assert [in_flight(schedule, stage, pipe, micro_batches) for stage in range(pipe)] == peak
