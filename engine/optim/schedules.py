"""The learning rate as a pure function of the step: resume needs nothing but the step's number."""

from __future__ import annotations

import math

from engine.config.schema import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """What the peak learning rate is multiplied by in `step` (from 0) of a run stage of `num_steps`.

    Linear warmup reaches 1 in the last warmup step; linear or cosine decay (Loshchilov and Hutter 2017) reaches
    `final_factor` in the last decay step, and stays there.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.shape == "constant":
        return 1.0
    decay_steps = (schedule.decay_steps or num_steps) - schedule.warmup_steps
    progress = min((step + 1 - schedule.warmup_steps) / max(decay_steps, 1), 1.0)
    left = 1.0 - progress if schedule.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_factor + (1.0 - schedule.final_factor) * left
