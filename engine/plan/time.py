"""An estimate of the seconds of a step on a cluster, and its error against published runs.

The parts are added up: arithmetic at the share of the peak that matrix products of this width reach, the idle time of
the pipeline, the optimizer's pass over memory, and bytes on the links; nothing counts as hidden behind arithmetic.
`LARGEST_SHARE` and `HALF_WIDTH` are fitted to the published runs that tests/engine/plan/test_time.py names, and `BAND`
is the largest ratio by which the estimate misses one of them: a statement about those runs, not a promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.plan.frozen import useful_operations
from engine.plan.hardware import Accelerator, Cluster
from engine.plan.memory import DTYPE_BYTES, HOST_GRADIENT_BYTES
from engine.plan.pipeline import bubble
from engine.plan.plan import RunStagePlan, StagePlan

LARGEST_SHARE = 0.60
"""Share of the peak for matrix products of unlimited size."""
HALF_TOKENS = 256
"""Tokens of a micro-batch at which half of that is reached: smaller ones do not fill the machine."""
HALF_WIDTH = 400
"""Width at which half of that is reached. Tensor parallelism divides one side of each product: its width counts as
hidden size / sqrt(tensor ranks)."""
BAND = 1.3
"""Largest ratio between a published run's step and its estimate, either way."""
OPTIMIZER_BYTES = 28
"""Bytes read and written per parameter that a rank updates: gradient (4), and master weight and two moments, each read
and written (8 each), in fp32."""
HOST_COPY_BYTES = 8
"""Further bytes of the host's memory per parameter with `offload`: the gradient that arrives (4), and the master that
is read for the working copy (4), which is written in its own dtype."""
REMADE_PASSES = 3
"""Passes over memory for each byte that `selective` makes again: two operands read, a result written."""
PARTS = ("arithmetic", "recompute", "tensor", "pipe", "data", "optimizer", "offload", "idle")
BETWEEN_WAITS = PARTS.index("pipe") + 1
"""Parts that lie between the waits of the pipeline: all up to its own traffic."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest pipeline stage, by what they go to."""

    arithmetic: float
    recompute: float
    """Work done for the second time: whole layers under `recompute: full`; under `selective` a pass over memory."""
    tensor: float
    pipe: float
    data: float
    optimizer: float
    """The update, where the optimizer's state lies; Muon's products and exchanges are in it."""
    offload: float
    """Gradients to the host and weights back."""
    idle: float
    """Waiting for other pipeline stages."""
    utilisation: float
    """Model FLOPs utilisation of every accelerator."""

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def band(self) -> tuple[float, float]:
        """Least and most seconds, as far as published runs go."""
        return self.total / BAND, self.total * BAND

    def parts(self) -> dict[str, float]:
        """Seconds of each part by its name."""
        return {name: getattr(self, name) for name in PARTS}

    def shares(self) -> dict[str, float]:
        """Each part's share of the step, largest first."""
        largest_first = sorted(self.parts().items(), key=lambda part: -part[1])
        return {name: seconds / self.total for name, seconds in largest_first}


def reached_share(width: float, tokens: int | None = None) -> float:
    """Return the share of the peak that products with matrices of this width reach: 0.3 at 400, 0.48 at 1600.

    `tokens` are the rows of the other operand; None means as many as the width, or more."""
    of_width = LARGEST_SHARE * width / (width + HALF_WIDTH)
    return of_width if tokens is None else of_width * tokens / (tokens + HALF_TOKENS)


def mean_step_time(config: RunConfig, layout: Layout, run_stages: Sequence[RunStagePlan], cluster: Cluster) -> StepTime:
    """Return the mean step of a run, each run stage weighted by its steps, with the run's `run_stage_plans`.

    A step of a run stage counts as one of its largest batch. Utilisation is that of the whole time.
    """
    num_steps = sum(run_stage.num_steps for run_stage in config.stages)
    # Weighted by steps and not by tokens: what is averaged is seconds per step.
    weights = [run_stage.num_steps / num_steps for run_stage in config.stages]
    times = [
        step_time(config, run_stage, layout, planned.stages, cluster)
        for run_stage, planned in zip(config.stages, run_stages, strict=True)
    ]
    if len(times) == 1:
        return times[0]
    seconds = {name: sum(w * time.parts()[name] for w, time in zip(weights, times, strict=True)) for name in PARTS}
    # Utilisation x seconds is proportional to useful operations, which add up; utilisations alone do not.
    useful = sum(w * time.utilisation * time.total for w, time in zip(weights, times, strict=True))
    return StepTime(**seconds, utilisation=useful / sum(seconds.values()))


def step_time(
    config: RunConfig, run_stage: RunStage, layout: Layout, stages: Sequence[StagePlan], cluster: Cluster
) -> StepTime:
    """Return the estimate for a step of the largest batch of a run stage, with its `stage_plans`."""
    # The slowest stage sets the beat of the whole pipeline; the optimizer's part comes once, after the last wait.
    slowest = max(
        (_stage_time(config, run_stage, layout, stage, cluster) for stage in stages),
        key=lambda t: sum(t[:BETWEEN_WAITS]),
    )
    micro_batches = num_micro_batches(run_stage.batches.largest, config.parallel, layout.data)
    waiting = float(bubble(config.parallel.schedule, layout.pipe, config.parallel.chunks_per_stage, micro_batches))
    # `waiting` is a share of busy and idle time together: w = idle / (busy + idle).
    idle = sum(slowest[:BETWEEN_WAITS]) * waiting / (1 - waiting)
    per_row = useful_operations(config.model, run_stage)
    # Without recomputation and vocabulary padding, as MFU is published (Chowdhery et al. 2022, appendix B).
    useful = per_row * run_stage.batches.largest / cluster.world_size
    reached = useful / (sum(slowest) + idle)
    return StepTime(*slowest, idle=idle, utilisation=reached / cluster.accelerator.bf16_operations_per_second)


def _stage_time(
    config: RunConfig, run_stage: RunStage, layout: Layout, stage: StagePlan, cluster: Cluster
) -> tuple[float, ...]:
    """Return (arithmetic, recompute, tensor, pipe, data, optimizer, offload) seconds of one rank of a stage."""
    accelerator, traffic = cluster.accelerator, stage.traffic
    # The geometric mean of a product's two sides, of which tensor parallelism divides one.
    width = config.model.hidden_size / layout.tensor**0.5
    tokens = config.parallel.micro_batch_size * run_stage.sequence_length // layout.sequence
    speed = accelerator.bf16_operations_per_second * reached_share(width, tokens)
    # ZeRO shards over both axes; their ranks stand `tensor` apart, for tensor is the innermost axis.
    zero_size = layout.data * layout.sequence
    update, transfer = optimizer_seconds(stage.updated, config, accelerator)
    orthogonal = (
        stage.update_operations / (accelerator.bf16_operations_per_second * reached_share(config.model.hidden_size))
        + traffic.updates / cluster.bytes_per_second(zero_size, layout.tensor)
        + traffic.updates_across / cluster.bytes_per_second(layout.tensor, 1)
    )
    return (
        (stage.operations - stage.recomputed_operations) / speed,
        # `full` repeats products, `selective` only passes over memory; the other summand is 0.
        stage.recomputed_operations / speed + REMADE_PASSES * stage.remade_bytes / accelerator.memory_bytes_per_second,
        traffic.tensor / cluster.bytes_per_second(layout.tensor, 1)
        + traffic.sequence / cluster.bytes_per_second(layout.sequence, layout.tensor),
        traffic.pipe / cluster.bytes_per_second(layout.pipe, zero_size * layout.tensor),
        (traffic.gradients + traffic.weights) / cluster.bytes_per_second(zero_size, layout.tensor)
        + traffic.weights_within / cluster.bytes_per_second(config.parallel.gather_within or 1, layout.tensor),
        update + orthogonal,
        transfer,
    )


def optimizer_seconds(updated: int, config: RunConfig, accelerator: Accelerator) -> tuple[float, float]:
    """Return the (update, transfer) seconds for `updated` parameters of one rank.

    The update is a pass over the memory where their state lies; with `offload` the transfer is a gradient in fp32 to
    the host and a weight back."""
    if config.parallel.offload == "none":
        return updated * OPTIMIZER_BYTES / accelerator.memory_bytes_per_second, 0.0
    weight_bytes = DTYPE_BYTES[config.precision.dtype]
    passed = OPTIMIZER_BYTES + HOST_COPY_BYTES + weight_bytes
    moved = HOST_GRADIENT_BYTES + weight_bytes
    return (
        updated * passed / accelerator.host_bytes_per_second,
        updated * moved / accelerator.host_link_bytes_per_second,
    )
