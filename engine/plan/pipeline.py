"""Cost of a pipeline schedule: idle time, and passes alive at once. The formulas of `engine.parallel.schedule`.

Letters as in Narayanan et al. 2021: p stages, v chunks per stage, m micro-batches.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

Schedule = Literal["1f1b", "gpipe", "zb-h1"]


def bubble(schedule: Schedule, pipe: int, chunks_per_stage: int, num_micro_batches: int) -> Fraction:
    """Share of a step in which a stage waits: (p-1) / (v m + p-1), with v = 1 for 1F1B and GPipe.

    Narayanan et al. 2021, section 2.2, with the whole step (not its busy part) as denominator, where all chunks take
    equally long. Interleaved, m that p does not divide take as long at most as the next multiple would. ZB-H1 waits
    for (p-1)(T_F + T_B) - (min(m, p) - 1) T_W, which for m >= p is (p-1)(T_F + T_B - T_W) (Qi et al. 2023, table 1);
    here a forward pass, its inputs' gradients and its weights' gradients take equally long.

    With p = 4 and m = 8: 1F1B waits for 3/11 of the step, with v = 2 for 3/19, ZB-H1 for 1/9.
    """
    if schedule == "zb-h1":
        idle = 2 * (pipe - 1) - (min(num_micro_batches, pipe) - 1)  # T_F = T_B = T_W = 1
        return Fraction(idle, 3 * num_micro_batches + idle)  # busy: T_F + T_B + T_W each
    if chunks_per_stage == 1:
        return Fraction(pipe - 1, num_micro_batches + pipe - 1)
    # Interleaved 1F1B runs micro-batches in groups of p; a last group that is short keeps the time of a whole one.
    filled = -(-num_micro_batches // pipe) * pipe
    return 1 - Fraction(chunks_per_stage * num_micro_batches, chunks_per_stage * filled + pipe - 1)


def in_flight(schedule: Schedule, stage: int, pipe: int, chunks_per_stage: int, num_micro_batches: int) -> int:
    """Forward passes of a chunk whose activations a stage holds at its peak; a bound where p does not divide m.

    One more than those that a stage begins with: p-1-s for 1F1B, 2(p-1-s) + (v-1)p interleaved, all for GPipe.
    ZB-H1 keeps a micro-batch until its weight gradients are made: p on every stage.

    With p = 4 and m = 8 the stages hold 4, 3, 2, 1 micro-batches; with v = 2, 11, 9, 7, 5 passes of a chunk.
    """
    if schedule == "zb-h1":
        return min(pipe, num_micro_batches)
    if schedule == "gpipe":
        return num_micro_batches
    if chunks_per_stage == 1:
        return min(pipe - stage, num_micro_batches)
    return min(2 * (pipe - 1 - stage) + (chunks_per_stage - 1) * pipe + 1, chunks_per_stage * num_micro_batches)
