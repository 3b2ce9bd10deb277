"""A run's configuration whole, `RunConfig`: begin to read here; the sections are the neighbours of this file.

Nothing in them reads a file, a clock, the environment or a device, so a configuration is checked on a login node.
Rules that join several fields are in `engine.config.rules`, which `engine.config.resolve` calls.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from engine.config.schema.checkpoint import CheckpointConfig
from engine.config.schema.model import AnyModelConfig
from engine.config.schema.optimizer import OptimizerConfig, PrecisionConfig, StabilityConfig
from engine.config.schema.parallel import ElasticConfig, ParallelConfig
from engine.config.schema.reservoir import ReservoirConfig
from engine.config.schema.section import KeyKind, Section
from engine.config.schema.stage import RunStage


class LaunchConfig(Section):
    """Supervision of the ranks: when one is taken for hung, under any launcher, and how often `palimpsest launch`
    starts them again."""

    kind: ClassVar[KeyKind] = "execution"

    restarts: NonNegativeInt = 0
    """Number of restarts after a failure; one more failure ends the launch."""
    requeues: NonNegativeInt = 0
    """Number of times that a Slurm job which has saved, or lost too many nodes, is put back into the queue."""
    step_limit_seconds: PositiveFloat = 300.0
    """Seconds without a sign of life, within a step or a part of an evaluation, after which a rank counts as hung,
    unless `step_limit_factor` allows more."""
    step_limit_factor: PositiveFloat = 20.0
    """Multiple of the usual step's time after which a rank counts as hung, where that is longer than
    `step_limit_seconds`."""
    start_limit_seconds: PositiveFloat = 1800.0
    """Seconds without a sign of life after which a rank counts as hung while a run starts or loads, and in its first
    steps."""
    save_limit_seconds: PositiveFloat = 1800.0
    """Seconds without a sign of life after which a rank counts as hung while a checkpoint is saved, and at the end."""
    stop_before_seconds: NonNegativeFloat | None = None
    """Seconds before the time limit of the cluster's job at which the run saves and leaves, to be taken up by the next
    job. Slurm's limits are known. None means that the job's end is not looked at."""
    probe_every_steps: PositiveInt | None = 500
    """Number of steps from one search for slow nodes to the next: every rank times a small computation, and hosts that
    stay much slower than the others are written to `slow-nodes.txt`. None means no search."""
    collective_limit_seconds: float = Field(default=3600.0, gt=0, le=1e8)
    """Seconds that a rank waits for the others, when they meet and in a collective. Longer than `start_limit_seconds`
    and `save_limit_seconds`: what one rank is allowed, the others must wait for."""


class EarlyStoppingConfig(Section):
    """End of a run of one stage once its evaluations no longer improve."""

    kind: ClassVar[KeyKind] = "schedule"

    patience: PositiveInt
    """Number of evaluations in a row without an improvement after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """Difference to the best value so far that an improvement has to exceed."""
    metric: str | None = None
    """Name of the metric of an evaluation that is watched, as in `metrics.jsonl`: `validation_loss`, or of a task also
    `validation_accuracy` and its other measures. None means `checkpoint.best_metric`."""


class EvaluationConfig(Section):
    """Evaluation on held-out data during training."""

    kind: ClassVar[KeyKind] = "execution"
    kinds: ClassVar[dict[str, KeyKind]] = {"early_stopping": "schedule"}

    every_steps: PositiveInt | None = None
    """Number of steps from one evaluation to the next; there is one at the end, too. None means at the end only."""
    max_samples: PositiveInt | None = None
    """Number of samples used of each validation set. None means all."""
    forgetting_limit: PositiveFloat | None = None
    """Rise of an earlier run stage's validation loss since the end of that stage, in nats per token, beyond which there
    is an alarm. None means no alarm."""
    on_forgetting: Literal["warn", "stop", "raise"] = "warn"
    """Reaction to that alarm: a warning at every evaluation, a checkpoint and the end of the run, or a higher ratio of
    replay from the next step on."""
    raised_ratios: tuple[float, ...] = ()
    """Ratios of replay, rising, that `on_forgetting: raise` goes through: each alarm takes the next one above the ratio
    in force; beyond the last one it warns."""
    tasks: dict[str, Path] = Field(default_factory=dict)
    """Files of questions (JSON lines of `context`, `choices` and `gold`) by their names, whose answers are ranked by
    likelihood at each evaluation."""
    early_stopping: EarlyStoppingConfig | None = None
    """End of the run before its last step. None means that it goes on to the last one."""

    def __hash__(self) -> int:
        # without `tasks`: a mapping has no hash
        return hash((self.every_steps, self.max_samples, self.forgetting_limit, self.on_forgetting))


class LoggingConfig(Section):
    """Metrics: how often they are written, and where to."""

    kind: ClassVar[KeyKind] = "execution"

    every_steps: PositiveInt = 1
    """Number of steps from one line of metrics to the next."""
    tensorboard: bool = True
    """TensorBoard event files in the run folder."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases: no run there, one in files that can be sent later, or one that is sent at once."""
    wandb_project: str = "palimpsest"
    """Name of the project in Weights & Biases."""
    plot: bool = True
    """Plot of the loss curve, `loss.png` in the run folder, drawn now and then while the run goes on and at the end."""


class InitFrom(Section):
    """Weights that a run starts from; a plain text is its `path`."""

    kind: ClassVar[KeyKind] = "execution"
    kinds: ClassVar[dict[str, KeyKind]] = {
        "missing": "meaning",
        "new_rows": "meaning",
        "moments": "meaning",
        "head": "meaning",
        "fingerprint": "meaning",
    }

    path: str
    """Hugging Face folder, run folder (its newest checkpoint), checkpoint, or one of DeepSpeed's (universal ones, too)
    or of torch's DCP; a path or an fsspec URL."""
    missing: Literal["error", "initialise"] = "error"
    """Treatment of heads and vocabulary rows that the source lacks: an error, or initial weights of the run's seed."""
    new_rows: Literal["random", "mean"] = "random"
    """Values of vocabulary rows that the source lacks, with `missing: initialise`: those of the run's seed, or the mean
    of the source's rows, with which a new token begins as likely as an average one."""
    head: Literal["keep", "new"] = "keep"
    """Head of a task that the source has: kept, or left out for a new one of another task."""
    moments: bool = False
    """True takes the optimizer's moments, too, and the number of updates that they have seen."""
    fingerprint: str | None = None
    """Hash of the source's weights. None means that the run notes it when it starts; then other weights are refused."""

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class RunConfig(Section):
    """Everything that `palimpsest train` needs to know; saved, resolved, in the run folder."""

    kinds: ClassVar[dict[str, KeyKind]] = {
        "name": "execution",
        "folder": "execution",
        "tokenizer": "execution",
        "checks": "execution",
        "export": "execution",
        "reservoir": "schedule",
        "init_from": "execution",  # where it is none; its own keys have kinds of their own
    }

    name: str = "run"
    """Name of the run, in metrics and messages."""
    folder: Path
    """Run folder: checkpoints, metrics, logs, outcome. Training again with the same folder resumes."""
    seed: NonNegativeInt = 0
    """Seed of everything that is random: initial weights, order of the samples, masks, dropout."""
    model: AnyModelConfig
    """Model: its family, its sizes and the form of its parts."""
    init_from: InitFrom | None = None
    """Weights that the run starts from where it has no checkpoint of its own. None means random ones. With it, `model`
    may be left out, or must agree with the source but for dropout."""
    tokenizer: Path
    """Folder of the tokenizer that the shards were written with."""
    stages: tuple[RunStage, ...] = Field(min_length=1)
    """Run stages, one after the other. Later ones may be appended to a run that has begun."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and its settings."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    stability: StabilityConfig = StabilityConfig()
    """Reaction to steps that go wrong."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout: how the ranks share the work."""
    elastic: ElasticConfig = ElasticConfig()
    """Changes that follow a change of the number of ranks."""
    launch: LaunchConfig = LaunchConfig()
    """Supervision by `palimpsest launch`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out data."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints: when they are saved, and which of them stay."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics and where they go."""
    reservoir: ReservoirConfig | None = None
    """Reservoir of documents that were trained on, for later run stages to replay. None means that none is kept."""
    checks: bool = False
    """Checks of the invariants of parallel training after every step: equal copies are equal, gradients are cleared."""
    export: Literal["huggingface", "none"] = "huggingface"
    """Library that the trained model is meant for. `plan` and `train` warn where it has no twin of the model; `none`
    silences them."""

    @property
    def run_stage_ends(self) -> frozenset[int]:
        """Steps, over the whole run, with which its run stages end."""
        return frozenset(itertools.accumulate(run_stage.num_steps for run_stage in self.stages))

    @property
    def num_steps(self) -> int:
        """Steps of all run stages together."""
        return sum(run_stage.num_steps for run_stage in self.stages)

    def distils_labels(self, run_stage: int) -> bool:
        """Return True if a run stage distils and has predicted labels to keep: its first weights have a head that was
        trained before, and what that predicts is a distribution over labels."""
        head, distillation = self.model.task_head, self.stages[run_stage].regularization.distillation
        if distillation is None or head is None or head.task == "regression":
            return False
        return run_stage > 0 or (self.init_from is not None and self.init_from.head == "keep")

    def tokens(self, steps: int) -> int:
        """Return the tokens, padding included, of the first `steps` steps."""
        found = 0
        for run_stage in self.stages:
            within = min(steps, run_stage.num_steps)
            found += run_stage.batches.samples(within) * run_stage.sequence_length
            steps -= within
        return found

    if TYPE_CHECKING:  # pydantic gives it to frozen models, which type checkers do not see

        def __hash__(self) -> int: ...
