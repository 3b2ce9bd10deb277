"""The sections of a run stage: its length, its learning rate over that length, its batch sizes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from engine.config.batch_ramp import Ramp, make_ramp
from engine.config.schema.data import DataConfig, ReplayConfig, TableRow
from engine.config.schema.objective import ObjectiveConfig
from engine.config.schema.regularization import (
    EMA,
    FIRST_WEIGHTS,
    FISHER,
    REPTILE,
    EMAConfig,
    RegularizationConfig,
    ReptileConfig,
)
from engine.config.schema.section import KeyKind, Section


class Duration(Section):
    """Length of a run stage, in steps or in tokens, not both."""

    kind: ClassVar[KeyKind] = "schedule"

    steps: PositiveInt | None = None
    """Number of optimizer steps. None means that `tokens` says how long the run stage is."""
    tokens: PositiveInt | None = None
    """Number of tokens, rounded up to whole steps. None means that `steps` says how long the run stage is."""
    epochs: PositiveFloat | None = None
    """Number of passes over the examples of a task; `palimpsest finetune`, which counts them, makes steps of it. None
    means that `steps` or `tokens` says how long the run stage is."""


class ScheduleConfig(Section):
    """Learning rate over a run stage, as a factor of its peak; `engine.optim.schedules` has the formulas.

    Every shape begins with a linear warm-up; a key that a shape does not use keeps its default.
    """

    kind: ClassVar[KeyKind] = "schedule"

    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the run stage. None means `optimizer.learning_rate`."""
    shape: Literal["constant", "linear", "cosine", "wsd", "infinite", "rewarm"] = "cosine"
    """Shape of the learning rate. `wsd`: warm-up, constant, decay at the end. `infinite`: warm-up, cool-down to a
    constant, constant, anneal at the end. `rewarm`: a cosine that goes on from the factor where an earlier run ended.
    """
    unit: Literal["steps", "tokens"] = "steps"
    """Unit of the lengths below."""
    warmup: NonNegativeInt = 0
    """Length of the warm-up, in `unit`."""
    decay: PositiveInt | None = None
    """Length of the decay, in `unit`. None means to the end of the run stage (`linear`, `cosine` and `rewarm`, which
    decay after the warm-up); `wsd` and `infinite`, which decay at the end, need a length."""
    cooldown: NonNegativeInt = 0
    """Length of the cool-down, in `unit` (`infinite`)."""
    initial_factor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Factor that the warm-up begins at (`rewarm`)."""
    constant_factor: float = Field(default=0.5, ge=0.0, le=1.0)
    """Factor of the constant phase (`infinite`)."""
    final_factor: float = Field(default=0.1, ge=0.0, le=1.0)
    """Factor that the decay ends at."""


class SmallerBatch(Section):
    """One entry of a batch-size ramp: a size, and the end of its use."""

    size: PositiveInt
    """Number of samples per step."""
    until_step: PositiveInt | None = None
    """Number of finished steps of the run stage at which the next size begins. None means that `until_tokens` says it.
    """
    until_tokens: PositiveInt | None = None
    """Number of consumed tokens of the run stage from which on a step has the next size. None means that `until_step`
    says it."""


class UnfreezingConfig(Section):
    """Gradual unfreezing (Howard and Ruder 2018, arXiv 1801.06146, section 3.3): the head and the last layers are
    trained first, then more and more, from the last layer to the first."""

    layers: PositiveInt = 1
    """Number of layers more that are trained each time."""
    epochs: PositiveFloat = 1.0
    """Passes over the examples from one time to the next."""


class RunStage(Section):
    """One stage of a run: its data, its batch and its length."""

    kinds: ClassVar[dict[str, KeyKind]] = {"learning_rate_factors": "schedule", "ema": "schedule"}

    name: str = "pretrain"
    """Name of the run stage, different from those of the others."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Objective: what the model learns to predict; a name alone takes the objective's defaults."""
    data: DataConfig
    """Data: which token shards the run stage reads, and how documents share a row."""
    replay: ReplayConfig | None = None
    """Replay of earlier data beside it. None means that nothing is replayed."""
    sequence_length: int = Field(ge=1, le=2**30)
    """Number of tokens per sample that the model sees (span corruption: that the encoder sees)."""
    global_batch_size: int = Field(ge=1, le=2**30)
    """Number of samples per step over all ranks; it does not change with the layout."""
    batch_ramp: tuple[SmallerBatch, ...] = ()
    """Batch sizes that come before `global_batch_size`, each until a step or a number of tokens."""
    duration: Duration
    """Length of the run stage, in steps or in tokens."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run stage."""
    learning_rate_factors: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rate by name pattern (shell style, as `optimizer.no_decay`) of parameters. A parameter
    that several patterns match takes the product of their factors; one that none matches has factor 1."""
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor of the learning rate from one layer to the one before it, from the head on; `palimpsest finetune` makes
    `learning_rate_factors` of it. None means 1."""
    unfreezing: UnfreezingConfig | None = None
    """Gradual unfreezing of the layers; `palimpsest finetune` makes several run stages of it. None means none."""
    freeze: tuple[str, ...] = ()
    """Name patterns (shell style, as `learning_rate_factors`) of parameters that stay as they are during the run stage:
    they have no gradient and no moments. Moments of a parameter that is trained again later begin at zero."""
    regularization: RegularizationConfig = RegularizationConfig()
    """Terms of the loss against forgetting."""
    ema: EMAConfig | None = None
    """Exponential moving average of the weights. None means that none is kept."""
    reptile: ReptileConfig | None = None
    """Meta-steps of Reptile. None means none."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """Moments of the optimizer at the beginning of the run stage: kept from the one before, or set to zero."""

    def __hash__(self) -> int:
        # Of a few keys: some others are mappings, which have no hash. Equal run stages have equal hashes all the same.
        return hash((self.name, self.sequence_length, self.global_batch_size))

    @property
    def replayed_objective(self) -> ObjectiveConfig | None:
        """Objective of pretraining that replayed samples have beside the task of the run stage; None without one."""
        return None if self.replay is None else self.replay.objective

    @property
    def replays_reservoir(self) -> bool:
        """True where the run's own reservoir is replayed."""
        return self.replay is not None and self.replay.source is None

    @property
    def added_moments(self) -> tuple[str, ...]:
        """Names of the fp32 values that the run stage keeps beside each trained weight and the optimizer's moments."""
        terms = self.regularization
        kept = {
            FIRST_WEIGHTS: terms.l2_sp or terms.ewc or terms.distillation or terms.mixout,
            FISHER: terms.ewc,
            EMA: self.ema,
            REPTILE: self.reptile,
        }
        return tuple(name for name, asked in kept.items() if asked is not None)

    @property
    def batches(self) -> Ramp:
        """Samples per step, as a function of the step."""
        ends = [
            (entry.size, entry.until_step or 0, math.ceil((entry.until_tokens or 0) / self.sequence_length))
            for entry in self.batch_ramp
        ]
        return make_ramp(ends, self.global_batch_size)

    def first_step(self, row: TableRow) -> int:
        """Return the step of this stage from which on a row of a table is in force."""
        return row.from_step or self.batches.steps(math.ceil((row.from_tokens or 0) / self.sequence_length))

    @property
    def num_steps(self) -> int:
        """Steps of this stage; a length in tokens is rounded up to whole steps."""
        if self.duration.steps is not None:
            return self.duration.steps
        assert self.duration.tokens is not None, "resolve() lets no stage without a length pass"
        return self.batches.steps(math.ceil(self.duration.tokens / self.sequence_length))
