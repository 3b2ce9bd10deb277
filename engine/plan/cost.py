"""Cost of a whole run on a cluster: steps, tokens, seconds, accelerator-hours, and the bytes of its checkpoints.

A run costs the sum of its run stages, and a step of each batch size of a ramp is estimated by itself. An evaluation is
the forward pass of its samples, a third of a step's arithmetic for as many; one falls due at the end of every run
stage. Of a checkpoint the run waits for the copy to host memory, or for all of it where saves are synchronous, and at
the end; how fast storage is cannot be known, so one figure stands for all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from engine.config.kept_moments import kept_moments
from engine.config.resolve import Layout
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.plan.hardware import Cluster
from engine.plan.memory import ADDED_MOMENT_BYTES, MASTER_BYTES, MOMENTS_BYTES, MOMENTUM_BYTES
from engine.plan.parameters import counted_entries, num_parameters
from engine.plan.plan import StagePlan, stage_plans
from engine.plan.run_stages import PipelineCut, pipeline_cut
from engine.plan.time import BAND, StepTime, step_time

STORAGE_BYTES_PER_SECOND = 2e9
"""Bytes per second that a node writes to shared storage: its share of a busy parallel file system."""
SECONDS_PER_HOUR = 3600
TOTALS = (
    "steps",
    "tokens",
    "training_seconds",
    "evaluations",
    "evaluation_seconds",
    "seconds",
    "band_seconds",
    "gpu_hours",
)
"""Properties of a `Cost` that its JSON has, too."""


@dataclass(frozen=True)
class RunStageCost:
    """Steps and seconds of one run stage."""

    name: str
    steps: int
    tokens: int
    step: StepTime
    """A step of its largest batch."""
    training_seconds: float
    evaluations: int
    evaluation_seconds: float | None
    """Seconds of all evaluations; None where the number of samples is not known (`evaluation.max_samples`)."""

    @property
    def seconds(self) -> float:
        """Training and evaluations as far as they are known, without checkpoints."""
        return self.training_seconds + (self.evaluation_seconds or 0.0)


@dataclass(frozen=True)
class Cost:
    """Cost of a whole run on `ranks` accelerators."""

    ranks: int
    run_stages: tuple[RunStageCost, ...]
    checkpoints: int
    checkpoint_bytes: int
    """Bytes of the largest one: every real parameter once in fp32, a tied one, too, and its moments."""
    checkpoint_seconds: float
    """Seconds from the beginning of a save to its commit."""
    held_up_seconds: float
    """Seconds of these that the run waits, for each checkpoint."""
    kept_checkpoints: int
    """Checkpoints on the disk at the end."""

    @property
    def steps(self) -> int:
        return sum(run_stage.steps for run_stage in self.run_stages)

    @property
    def tokens(self) -> int:
        return sum(run_stage.tokens for run_stage in self.run_stages)

    @property
    def training_seconds(self) -> float:
        return sum(run_stage.training_seconds for run_stage in self.run_stages)

    @property
    def evaluations(self) -> int:
        return sum(run_stage.evaluations for run_stage in self.run_stages)

    @property
    def evaluation_seconds(self) -> float | None:
        """Seconds of all evaluations; None where those of some run stage are not known."""
        seconds = [run_stage.evaluation_seconds for run_stage in self.run_stages]
        known = [value for value in seconds if value is not None]
        return sum(known) if len(known) == len(seconds) else None

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluations, and waits for checkpoints."""
        last = self.checkpoint_seconds - self.held_up_seconds  # the run ends with the commit of the last one
        return (
            sum(run_stage.seconds for run_stage in self.run_stages)
            + self.checkpoints * self.held_up_seconds
            + max(last, 0.0)
        )

    @property
    def band_seconds(self) -> tuple[float, float]:
        """Least and most seconds, as far as published runs go."""
        return self.seconds / BAND, self.seconds * BAND

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.ranks / SECONDS_PER_HOUR

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self) | {name: getattr(self, name) for name in TOTALS}


def run_cost(config: RunConfig, layout: Layout, cluster: Cluster) -> Cost:
    """Return the cost of a run in a layout that `resolve` or `examine` gave."""
    cut = pipeline_cut(config, layout, "cuda")
    ends = list(accumulate(run_stage.num_steps for run_stage in config.stages))
    run_stages = tuple(
        _run_stage_cost(config, run_stage, end, layout, cut, cluster)
        for run_stage, end in zip(config.stages, ends, strict=True)
    )
    steps = ends[-1]
    # All share the cut, but a run stage may store fewer moments than another one (frozen parameters), or more.
    planned = tuple(plan for run_stage in config.stages for plan in stage_plans(config, run_stage, layout, cut))
    copied, written = _checkpoint_seconds(planned, cluster)
    return Cost(
        ranks=layout.world_size,
        run_stages=run_stages,
        checkpoints=_due(0, steps, config.checkpoint.every_steps),
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoint_seconds=copied + written,
        held_up_seconds=copied if config.checkpoint.asynchronous else copied + written,
        kept_checkpoints=_kept(config, steps),
    )


def _run_stage_cost(
    config: RunConfig, run_stage: RunStage, end: int, layout: Layout, cut: PipelineCut, cluster: Cluster
) -> RunStageCost:
    """Return the cost of a run stage that ends with the run's step `end`."""

    def time_of(sized: RunStage) -> StepTime:
        return step_time(config, sized, layout, stage_plans(config, sized, layout, cut), cluster)

    steps, largest = run_stage.num_steps, time_of(run_stage)
    validated = run_stage.data.validation is not None
    evaluations = _due(end - steps, end, config.evaluation.every_steps) if validated else 0
    return RunStageCost(
        name=run_stage.name,
        steps=steps,
        tokens=run_stage.batches.samples(steps) * run_stage.sequence_length,
        step=largest,
        training_seconds=sum(count * time_of(sized).total for count, sized in _by_batch(run_stage))
        + _fisher_seconds(config, run_stage, time_of),
        evaluations=evaluations,
        evaluation_seconds=_evaluation_seconds(config, run_stage, largest, evaluations),
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of the largest checkpoint, but for its manifest and the sections that are under a MiB.

    Every parameter is counted with its moments and the values that a run stage adds, as if none were frozen.
    """
    model, matrices = config.model, 0
    if config.optimizer.name == "muon":
        entries = counted_entries(model, range(model.num_layers), True, True)
        # Muon keeps one moment of each of these, not Adam's two. Whole shapes: ranks store each parameter once.
        matrices = sum(entry.numel * entry.count for entry in entries if entry.is_linear)
    added = max(len(kept_moments(config, run_stage)) for run_stage in config.stages) * ADDED_MOMENT_BYTES
    return num_parameters(model) * (MASTER_BYTES + MOMENTS_BYTES + added) - matrices * (MOMENTS_BYTES - MOMENTUM_BYTES)


def _fisher_seconds(config: RunConfig, run_stage: RunStage, time_of: Callable[[RunStage], StepTime]) -> float:
    """Return the seconds of the batches that a run stage begins with to estimate its Fisher information."""
    if run_stage.regularization.ewc is None:
        return 0.0
    before = config.stages[config.stages.index(run_stage) - 1]
    return run_stage.regularization.ewc.batches * time_of(before).total


def _by_batch(run_stage: RunStage) -> list[tuple[int, RunStage]]:
    """Return (steps, run stage with that size alone) of each batch size that a run stage comes to."""
    ramp, found = run_stage.batches, []
    # Each size ends where the next one begins; a ramp may be longer than its run stage, so ends are cut off there.
    ends = (*ramp.first_steps[1:], run_stage.num_steps)
    for size, first, end in zip(ramp.sizes, ramp.first_steps, ends, strict=True):
        count = min(end, run_stage.num_steps) - first
        if count > 0:
            found.append((count, run_stage.model_copy(update={"global_batch_size": size, "batch_ramp": ()})))
    return found


def _due(first: int, end: int, every: int | None) -> int:
    """Return the number of multiples of `every` in the steps (first, end], with one at `end` in any case.

    >>> _due(10, 25, 10)  # after steps 20 and 25
    2
    """
    return 1 if every is None else -(-end // every) - first // every


def _kept(config: RunConfig, steps: int) -> int:
    """Checkpoints that retention leaves: the newest, the best, those of every so many steps and of run stages' ends."""
    checkpoint = config.checkpoint
    saved = _due(0, steps, checkpoint.every_steps)
    for_ever = steps // checkpoint.keep_every if checkpoint.keep_every is not None else 0
    # An upper bound: one checkpoint may be among the last, the best and the periodic ones at once.
    borders = len(config.stages) - 1  # the last run stage ends with the newest one
    return min(saved, checkpoint.keep_last + checkpoint.keep_best + for_ever + borders)


def _checkpoint_seconds(stages: tuple[StagePlan, ...], cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of (copy to host memory, writing) of the fullest rank and of a node full of its like."""
    largest = max(stage.stored_bytes for stage in stages)
    on_node = largest * min(cluster.per_node, cluster.world_size)
    # Each rank has a link to host memory of its own, but all ranks of a node share its way to storage.
    return largest / cluster.accelerator.host_link_bytes_per_second, on_node / STORAGE_BYTES_PER_SECOND


def _evaluation_seconds(config: RunConfig, run_stage: RunStage, step: StepTime, evaluations: int) -> float | None:
    samples = config.evaluation.max_samples
    if not evaluations:
        return 0.0
    if samples is None:
        return None
    # Forward is one of three parts, as backward multiplies twice as much; no gradients, no optimizer.
    forward = (step.arithmetic + step.tensor + step.pipe + step.idle) / 3
    # the averaged weights are evaluated beside the trained ones
    passes = 1 if run_stage.ema is None else 2
    return evaluations * passes * forward * samples / run_stage.batches.largest
