"""What a whole run costs on a cluster: steps, tokens, seconds, accelerator-hours, and what its checkpoints take.

A step of each batch size of a ramp is estimated by itself. An evaluation is the forward pass of its samples, a third of
a step's arithmetic for as many. Of a checkpoint the run waits for the copy to host memory, or for all of it where saves
are synchronous, and at the end; how fast storage is cannot be known, so one figure stands for all of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.config.resolve import Layout
from engine.config.schema.run import RunConfig
from engine.plan.hardware import Cluster
from engine.plan.memory import MASTER_BYTES, MOMENTS_BYTES, MOMENTUM_BYTES
from engine.plan.parameters import counted_entries, num_parameters
from engine.plan.plan import StagePlan, stage_plans
from engine.plan.time import BAND, step_time

STORAGE_BYTES_PER_SECOND = 2e9
"""That a node writes to shared storage: what a busy parallel file system leaves to one of many."""
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Cost:
    """Of a whole run, on `ranks` accelerators."""

    ranks: int
    steps: int
    tokens: int
    training_seconds: float
    evaluations: int
    evaluation_seconds: float | None
    """None where the number of held-out samples is not known (`evaluation.max_samples`)."""
    checkpoints: int
    checkpoint_bytes: int
    """Of one: every real parameter once in fp32, a tied one, too, and its moments."""
    checkpoint_seconds: float
    """From the beginning of a save to its commit."""
    held_up_seconds: float
    """Of them, those that the run waits for each."""
    kept_checkpoints: int
    """On the disk at the end."""

    @property
    def seconds(self) -> float:
        """All of it."""
        last = self.checkpoint_seconds - self.held_up_seconds  # the run ends with the commit of the last one
        return (
            self.training_seconds
            + (self.evaluation_seconds or 0.0)
            + self.checkpoints * self.held_up_seconds
            + max(last, 0.0)
        )

    @property
    def band_seconds(self) -> tuple[float, float]:
        """Least and most, as far as published runs go."""
        return self.seconds / BAND, self.seconds * BAND

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.ranks / SECONDS_PER_HOUR

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        totals = {"seconds": self.seconds, "band_seconds": self.band_seconds, "gpu_hours": self.gpu_hours}
        return asdict(self) | totals


def run_cost(config: RunConfig, layout: Layout, cluster: Cluster) -> Cost:
    """The cost of a run in a layout that `resolve` or `examine` gave."""
    run_stage, evaluation, every = config.stages[0], config.evaluation, config.checkpoint.every_steps
    steps = run_stage.num_steps
    stages = stage_plans(config, layout)
    training = sum(
        count * step_time(sized, layout, stage_plans(sized, layout), cluster).total
        for count, sized in _by_batch(config)
    )
    evaluations = _count(steps, evaluation.every_steps) if run_stage.data.validation is not None else 0
    copied, written = _checkpoint_seconds(stages, cluster)
    return Cost(
        ranks=layout.world_size,
        steps=steps,
        tokens=run_stage.batches.samples(steps) * run_stage.sequence_length,
        training_seconds=training,
        evaluations=evaluations,
        evaluation_seconds=_evaluation_seconds(config, layout, stages, cluster, evaluations),
        checkpoints=_count(steps, every),
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoint_seconds=copied + written,
        held_up_seconds=copied if config.checkpoint.asynchronous else copied + written,
        kept_checkpoints=_kept(config, steps),
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint, but for its manifest and the sections that are under a MiB."""
    model, matrices = config.model, 0
    if config.optimizer.name == "muon":
        entries = counted_entries(model, range(model.num_layers), True, True)
        matrices = sum(entry.numel * entry.count for entry in entries if entry.is_linear)
    return num_parameters(model) * (MASTER_BYTES + MOMENTS_BYTES) - matrices * (MOMENTS_BYTES - MOMENTUM_BYTES)


def _by_batch(config: RunConfig) -> list[tuple[int, RunConfig]]:
    """(steps, configuration without a ramp) of each batch size that the run comes to."""
    run_stage, found = config.stages[0], []
    ramp = run_stage.batches
    ends = (*ramp.first_steps[1:], run_stage.num_steps)
    for size, first, end in zip(ramp.sizes, ramp.first_steps, ends, strict=True):
        count = min(end, run_stage.num_steps) - first
        if count > 0:
            only = run_stage.model_copy(update={"global_batch_size": size, "batch_ramp": ()})
            found.append((count, config.model_copy(update={"stages": (only,)})))
    return found


def _count(steps: int, every: int | None) -> int:
    """How often something happens that is due after every so many steps and at the end."""
    return 1 if every is None else -(-steps // every)


def _kept(config: RunConfig, steps: int) -> int:
    """Checkpoints that retention leaves: the newest, the best, and those of every so many steps."""
    checkpoint = config.checkpoint
    saved = _count(steps, checkpoint.every_steps)
    for_ever = steps // checkpoint.keep_every if checkpoint.keep_every is not None else 0
    return min(saved, checkpoint.keep_last + checkpoint.keep_best + for_ever)


def _checkpoint_seconds(stages: tuple[StagePlan, ...], cluster: Cluster) -> tuple[float, float]:
    """(copy to host memory, writing) of the fullest rank and of a node full of its like."""
    largest = max(stage.stored_bytes for stage in stages)
    on_node = largest * min(cluster.per_node, cluster.world_size)
    return largest / cluster.accelerator.host_link_bytes_per_second, on_node / STORAGE_BYTES_PER_SECOND


def _evaluation_seconds(
    config: RunConfig, layout: Layout, stages: tuple[StagePlan, ...], cluster: Cluster, evaluations: int
) -> float | None:
    samples = config.evaluation.max_samples
    if not evaluations:
        return 0.0
    if samples is None:
        return None
    time = step_time(config, layout, stages, cluster)
    forward = (time.arithmetic + time.tensor + time.pipe + time.idle) / 3
    return evaluations * forward * samples / config.stages[0].batches.largest
