"""A run's configuration whole, `RunConfig`: begin to read here; the sections are the neighbours of this file.

Nothing in them reads a file, a clock, the environment or a device, so a configuration is checked on a login node.
Rules that join several fields live in `engine.config.resolve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from engine.config.schema.checkpoint import CheckpointConfig
from engine.config.schema.model import AnyModelConfig
from engine.config.schema.optimizer import OptimizerConfig, PrecisionConfig, StabilityConfig
from engine.config.schema.parallel import ElasticConfig, ParallelConfig
from engine.config.schema.section import Kind, Section
from engine.config.schema.stage import RunStage


class LaunchConfig(Section):
    """How `palimpsest launch` watches over the ranks: when it takes one for hung, and how often it restarts them."""

    kind: ClassVar[Kind] = "execution"

    restarts: NonNegativeInt = 0
    """Restarts after a failure; one more failure ends the launch."""
    step_limit_seconds: PositiveFloat = 300.0
    """A rank that gives no sign of life for so long within a step or a part of an evaluation hangs, or ..."""
    step_limit_factor: PositiveFloat = 20.0
    """... for so many times the usual step, whichever is longer."""
    start_limit_seconds: PositiveFloat = 1800.0
    """The same while a run starts or loads, and in its first steps."""
    save_limit_seconds: PositiveFloat = 1800.0
    """The same while a checkpoint is saved, and at the end."""
    collective_limit_seconds: float = Field(default=3600.0, gt=0, le=1e8)
    """How long a rank waits for the others, when they meet and in a collective. Longer than `start_limit_seconds` and
    `save_limit_seconds`: what one rank is allowed, the others must wait for."""


class EvaluationConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt | None = None
    """Held-out loss after every so many steps, and at the end; None means at the end only."""
    max_samples: PositiveInt | None = None
    """Held-out samples used of each held-out data set; None means all."""


class LoggingConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt = 1
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "palimpsest"
    plot: bool = True
    """Draw the loss curve to `loss.png` in the run folder, now and then while the run goes on and at the end."""


class RunConfig(Section):
    """Everything that `palimpsest train` needs to know; saved, resolved, in the run folder."""

    kinds: ClassVar[dict[str, Kind]] = {
        "name": "execution",
        "folder": "execution",
        "tokenizer": "execution",
        "checks": "execution",
        "export": "execution",
    }

    name: str = "run"
    folder: Path
    """Run folder: checkpoints, metrics, logs, outcome. Training again with the same folder resumes."""
    seed: NonNegativeInt = 0
    model: AnyModelConfig
    tokenizer: Path
    """Folder of the tokenizer that the shards were written with."""
    stages: tuple[RunStage, ...] = Field(min_length=1)
    """Run stages, one after the other. Later ones may be appended to a run that has begun."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    stability: StabilityConfig = StabilityConfig()
    parallel: ParallelConfig = ParallelConfig()
    elastic: ElasticConfig = ElasticConfig()
    launch: LaunchConfig = LaunchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    checks: bool = False
    """Hold the invariants of parallel training after every step: equal copies are equal, gradients are cleared."""
    export: Literal["huggingface", "none"] = "huggingface"
    """Where the trained model is meant to go. `plan` and `train` warn where it has no twin there; `none` silences it.
    """

    @property
    def num_steps(self) -> int:
        """Steps of all run stages together."""
        return sum(run_stage.num_steps for run_stage in self.stages)

    def tokens(self, steps: int) -> int:
        """Return the tokens, padding included, of the first `steps` steps."""
        found = 0
        for run_stage in self.stages:
            within = min(steps, run_stage.num_steps)
            found += run_stage.batches.samples(within) * run_stage.sequence_length
            steps -= within
        return found
