"""A further stage for a run: where the run stands, and the learning rate that the new stage goes on with.

The new stage begins at the end of the run's last stage. What its learning rate has to do there depends on whether the
last one has been decayed by then:

- Not decayed (constant, `wsd` or `infinite` before their last phase): the new stage keeps that rate and anneals at its
  end (`infinite`). Nothing is warmed up again, which is what makes a model forget (Singh et al. 2025, Beyond Cosine
  Decay; Ibrahim et al. 2024, Simple and Scalable Strategies to Continually Pre-train Large Language Models).
- Decayed: with the small rate a model learns little of the new data, so it is warmed up to the peak again and decayed
  once more (`rewarm`; Gupta et al. 2023, Continual Pre-Training of Large Language Models, and Ibrahim et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, committed
from engine.config import save
from engine.config.load import load_run
from engine.config.resume import refuse_new_meaning
from engine.config.schema.optimizer import OptimizerConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage, ScheduleConfig
from engine.errors import CheckpointError, EnvironmentProblem
from engine.optim.schedules import learning_rate
from engine.run_folder import current_user
from engine.train.records import metric_of
from engine.train.state import TrainState

WARMUP = 0.01
"""Share of the new stage that warms up (Ibrahim et al. 2024: 1 %; the length hardly matters)."""
ANNEAL = 0.1
"""Share of the new stage that anneals at the end of an `infinite` schedule (Haegele et al. 2024: 10 to 20 %)."""
FINAL_FACTOR: float = ScheduleConfig.model_fields["final_factor"].default


@dataclass(frozen=True)
class Standing:
    """Standing of a run: its newest checkpoint, and what was trained until then."""

    checkpoint: Path
    state: TrainState
    rate: float
    """Learning rate of the last step of the run's last stage: as recorded, or as the schedule says where that step is
    still to come."""
    phase: str
    """Phase of the schedule which that step is in."""

    def steps_left(self, config: RunConfig) -> int:
        """Return the steps of the run's present stages that are still to come."""
        return config.num_steps - self.state.step


@dataclass(frozen=True)
class Choice:
    """A schedule for a new stage, as keys of `schedule`, and the reason for it."""

    schedule: dict[str, Any]
    why: str


def standing(config: RunConfig) -> Standing:
    """Return where the run stands that a run file describes.

    Raises:
        EnvironmentProblem: it is still going on.
        CheckpointError: it has no checkpoint that can be read.
        ConfigError: the folder belongs to another run than the file describes.
    """
    folder = config.folder
    if (user := current_user(folder)) is not None:
        raise EnvironmentProblem(
            f"run {config.name} in {folder} is still going on (process {user.pid} on {user.host or 'an unknown host'})",
            "a run that has ended, or was stopped and saved",
            f"wait for its end, or let it save and stop: kill {user.pid or 'PID'} on that host",
        )
    path, state = _newest(config)
    if (folder / save.FILE).exists():
        refuse_new_meaning(load_run(folder / save.FILE), config, str(folder), state.run_stage)
    last = config.stages[-1]
    rate = learning_rate(config.optimizer, last, last.num_steps - 1)
    if state.run_stage == len(config.stages) - 1 and state.stage_step >= last.num_steps:
        # A stage that was shortened while it ran has ended before its last phase, whatever the formula says now.
        rate = metric_of(folder, [state.step], "learning_rate").get(state.step, rate)
    return Standing(path, state, rate, phase(config.optimizer, last, rate))


def _newest(config: RunConfig) -> tuple[Path, TrainState]:
    """Return the newest checkpoint whose manifest can be read, and the train state in it."""
    damaged: CheckpointError | None = None
    for path in committed(config.folder / CHECKPOINTS):
        try:
            sections = manifest_json.read(path).state.sections
        except CheckpointError as error:
            damaged = damaged or error
            continue
        if "progress" in sections:
            return path, TrainState.from_section(sections["progress"])
    if damaged is not None:
        raise damaged
    raise CheckpointError(
        f"run folder {config.folder} has no checkpoint: there is nothing to go on from",
        "the folder of a run that has saved",
        "train it first, or mend `folder` (a path that is not absolute counts from the working directory)",
    )


def peak_rate(optimizer: OptimizerConfig, run_stage: RunStage) -> float:
    """Return the peak learning rate of a run stage."""
    peak = run_stage.schedule.learning_rate
    return optimizer.learning_rate if peak is None else peak


def phase(optimizer: OptimizerConfig, run_stage: RunStage, rate: float) -> str:
    """Return the phase of a stage's schedule at the stage's end, by the learning rate there."""
    factor, schedule = rate / peak_rate(optimizer, run_stage), run_stage.schedule
    if _is_undecayed(schedule, factor):
        return "constant phase, not decayed"
    names = {"infinite": "end of the anneal", "constant": "warm-up"}
    return f"{names.get(schedule.shape, 'end of the decay')}, at {factor:.3g} of the peak"


def choose_schedule(optimizer: OptimizerConfig, last: RunStage, rate: float, tokens: int, step_tokens: int) -> Choice:
    """Return the schedule of a new stage of so many tokens, behind a stage that ends with the learning rate `rate`.

    `step_tokens` are the tokens of one step: no phase is shorter.
    """
    peak, schedule = peak_rate(optimizer, last), last.schedule
    factor = rate / peak
    if _is_undecayed(schedule, factor):
        # final_factor is relative to the new peak, which is the constant rate: the anneal ends where the old one would.
        final = min(schedule.final_factor / factor, 1.0) or FINAL_FACTOR
        decay = _length(ANNEAL, tokens, step_tokens)
        chosen = {"shape": "infinite", "unit": "tokens", "learning_rate": _number(rate), "constant_factor": 1.0}
        return Choice(
            chosen | {"decay": decay, "final_factor": _number(final)},
            f"the rate of stage {last.name} stands at {rate:.3g}, not decayed ({schedule.shape}), so the new stage "
            f"goes on with it and anneals over its last {ANNEAL:.0%}: nothing is warmed up again",
        )
    final = schedule.final_factor if schedule.shape != "constant" else FINAL_FACTOR
    warmup = _length(WARMUP, tokens, step_tokens)
    chosen = {"shape": "rewarm", "unit": "tokens", "learning_rate": _number(peak), "warmup": warmup}
    return Choice(
        chosen | {"initial_factor": _number(min(factor, 1.0)), "final_factor": _number(final)},
        f"the rate of stage {last.name} ends at {rate:.3g}, {factor:.3g} of its peak ({schedule.shape}): too small to "
        f"learn new data with, so it is warmed up to {peak:.3g} again and decayed once more",
    )


def course(optimizer: OptimizerConfig, run_stage: RunStage, steps: Sequence[int]) -> list[tuple[int, int, float]]:
    """Return (step, tokens until its end, learning rate) for some steps of a run stage, from 1."""
    length = run_stage.sequence_length
    return [
        (step, run_stage.batches.samples(step) * length, learning_rate(optimizer, run_stage, step - 1))
        for step in steps
    ]


def course_steps(run_stage: RunStage, num_points: int = 9) -> list[int]:
    """Return steps of a run stage, from 1: evenly spaced ones, and those where a phase of the schedule begins."""
    last, schedule = run_stage.num_steps, run_stage.schedule
    even = {max(1, round(last * k / (num_points - 1))) for k in range(num_points)}
    step_tokens = run_stage.global_batch_size * run_stage.sequence_length
    unit = step_tokens if schedule.unit == "tokens" else 1
    borders = {math.ceil(schedule.warmup / unit)}
    if schedule.shape in ("wsd", "infinite") and schedule.decay:
        borders.add(last - math.ceil(schedule.decay / unit))
    return sorted(step for step in even | borders if 1 <= step <= last)


def _is_undecayed(schedule: ScheduleConfig, factor: float) -> bool:
    level = {"constant": 1.0, "wsd": 1.0, "infinite": schedule.constant_factor}.get(schedule.shape)
    return level is not None and factor >= level * (1 - 1e-9)


def _length(share: float, tokens: int, step_tokens: int) -> int:
    """Return a share of the stage's tokens, in whole steps, one at least."""
    return max(1, round(share * tokens / step_tokens)) * step_tokens


def _number(value: float) -> float:
    """Return a number as somebody would write it: six digits."""
    return float(f"{value:.6g}")
