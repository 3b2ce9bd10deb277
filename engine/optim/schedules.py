"""The learning rate as a pure function of the steps or tokens done: resume needs nothing but their number."""

from __future__ import annotations

import math

from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.stage import RunStage, ScheduleConfig


def learning_rate(optimizer: OptimizerConfig, run_stage: RunStage, step: int) -> float:
    """Return the learning rate of `step` (from 0) of a run stage, for parameters whose factor is 1."""
    peak = run_stage.schedule.learning_rate
    return (optimizer.learning_rate if peak is None else peak) * factor_of_step(run_stage, step)


def factor_of_step(run_stage: RunStage, step: int) -> float:
    """Return the factor of the peak learning rate in `step` (from 0) of a run stage."""
    schedule, batches = run_stage.schedule, run_stage.batches
    done, length = step + 1, run_stage.num_steps
    # Tokens of full batches by arithmetic, padding included: the schedule never depends on the data.
    if schedule.unit == "tokens":
        done, length = (batches.samples(steps) * run_stage.sequence_length for steps in (done, length))
    return factor(schedule, done, length)


def factor(schedule: ScheduleConfig, done: int, length: int) -> float:
    """Return the factor of the step that ends when `done` of the stage's `length` (steps or tokens) are done.

    Counted at a step's end: the warm-up reaches 1 in its last step, a decay its final factor in the stage's last one,
    and no step is without a learning rate. Beyond its end a schedule stays where it ended.

    - `linear` and `cosine`: warm-up, then decay (cosine: Loshchilov and Hutter 2017, SGDR, without restarts).
    - `wsd`: warm-up, stable, decay (Hu et al. 2024, MiniCPM), which leaves the decay's form open: linear here, as in
      Haegele et al. 2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations.
    - `infinite`: warm-up, cool-down along a cosine to `constant_factor`, constant, exponential anneal (Ibrahim et al.
      2024, Simple and Scalable Strategies to Continually Pre-train Large Language Models). How long the constant phase
      lasts may be decided late: before the anneal nothing depends on `length`.
    - `rewarm`: up again from where an earlier run ended, and down a cosine once more (the same paper).
    """
    if done < schedule.warmup:
        return _line(schedule.initial_factor, 1.0, done / schedule.warmup)
    if schedule.shape == "constant":
        return 1.0
    after_warmup = done - schedule.warmup
    if schedule.shape in ("linear", "cosine", "rewarm"):
        decay = schedule.decay if schedule.decay is not None else length - schedule.warmup
        line_or_cosine = _line if schedule.shape == "linear" else _cosine
        return line_or_cosine(1.0, schedule.final_factor, _progress(after_warmup, decay))
    # wsd and infinite end with their decay: 0 before it begins, then up to 1.
    assert schedule.decay is not None, "resolve() lets no such schedule without a decay pass"
    progress = _progress(done - (length - schedule.decay), schedule.decay)
    if schedule.shape == "wsd":
        return _line(1.0, schedule.final_factor, progress)
    # The anneal is exponential. Its own factor is 1 until it begins (progress 0), whatever `length` is.
    constant = _cosine(1.0, schedule.constant_factor, _progress(after_warmup, schedule.cooldown))
    return constant * (schedule.final_factor / schedule.constant_factor) ** progress


def _progress(done: int, length: int) -> float:
    """Return the share of a phase that is done, from 0 to 1; a phase of length 0 is over with the first step in it."""
    return min(max(done / length, 0.0), 1.0) if length > 0 else float(done > 0)


def _line(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
