"""The sections of a run's configuration: plain frozen values, each field documented where it stands.

Nothing here reads a file, a clock, the environment or a device, so a configuration is checked on a login node.
Rules that join several fields live in `engine.config.resolve`. Each section says which kind its keys are
(contract "Config on resume"): `meaning` (a change makes another run), `schedule` (may change, is logged) or
`execution` (free: layout, launcher, logging).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from engine.config.ramp import Ramp, make_ramp

Kind = Literal["meaning", "schedule", "execution"]
Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion from text to number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    kind: ClassVar[Kind] = "meaning"
    """What a change of this section's keys means on resume."""
    kinds: ClassVar[dict[str, Kind]] = {}
    """Keys of this section whose kind is another one."""


class ModelConfig(Section):
    """A decoder in GPT-2 form (the defaults) or Llama form, an encoder in BERT or ModernBERT form, or T5 (see
    `configs/models`)."""

    kinds: ClassVar[dict[str, Kind]] = {"vocab_multiple": "execution"}

    family: Literal["gpt", "bert", "t5"] = "gpt"
    """Architecture family: decoders (`gpt`), encoders that predict masked tokens (`bert`), both in one (`t5`)."""
    vocab_size: PositiveInt
    """Real rows of the embedding: the tokenizer's size or more."""
    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this, for speed and so that tensor parallelism divides it."""
    num_layers: PositiveInt
    """Of an encoder-decoder (`t5`): of both stacks together."""
    num_decoder_layers: PositiveInt | None = None
    """`t5`: how many of them are the decoder's; None means half."""
    hidden_size: PositiveInt
    num_heads: PositiveInt
    head_width: PositiveInt | None = None
    """Width of a head; None means `hidden_size` / `num_heads`."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); None means `num_heads`."""
    ffn_size: PositiveInt | None = None
    """Inner width of the feed-forward part; None means 4 x `hidden_size`."""
    max_positions: PositiveInt = 1024
    """Longest sequence; rows of the position table when `position` is `learned`."""
    token_types: NonNegativeInt = 0
    """`bert`: kinds of segments that have an embedding, 2 for pairs; 0 means no such embedding."""
    pair_head: bool = False
    """`bert`: a second head says how the two segments of a row belong together (`objective.pairs`)."""
    position: Literal["learned", "rope", "relative"] = "learned"
    """`relative` (`t5`): a number per head and bucket of distances is added to scores, which are not scaled."""
    rope_theta: PositiveFloat = 10000.0
    local_attention: int | None = Field(default=None, ge=2, multiple_of=2)
    """`bert`: width of a window: in local layers a token sees what stands at most half of it away, on either side.
    None: every layer is global."""
    global_every: int = Field(default=3, ge=2)
    """With `local_attention`: one in so many layers, the first one to begin with, is global; the others are local."""
    local_rope_theta: PositiveFloat | None = None
    """`rope_theta` of local layers; None means the same."""
    relative_buckets: int = Field(default=32, ge=4, multiple_of=4)
    """Buckets of distances, in the encoder half of them for each direction."""
    relative_distance: PositiveInt = 128
    """Distances from here on share a bucket."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: PositiveFloat = 1e-5
    norm_bias: bool = True
    """Shifts of layer norms (RMS norms have none)."""
    norm_position: Literal["pre", "post"] = "pre"
    """`pre`: each part of a layer adds to the residual stream what it makes of its norm; `post` (`bert`): the sum of a
    part and its input is normalised."""
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    """Of the feed-forward part; the last three multiply what they make by a gate."""
    bias: bool = True
    """Biases in linear layers."""
    tie_embeddings: bool = True
    """The output projection is the token embedding."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of hidden states that training sets to 0: of the embedding, and of what each part of a layer makes. Keyed
    by (seed, step, sample, layer, site), so equal in every layout."""
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The same of attention's probabilities; above 0 they are computed one by one, which costs time and memory."""
    init_std: PositiveFloat = 0.02

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory; a function of the configuration alone, never of the layout."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_width or self.hidden_size // self.num_heads

    @property
    def score_scale(self) -> float | None:
        """Factor of attention scores; None means head_size ** -0.5."""
        return 1.0 if self.position == "relative" else None

    def reach(self, layer: int) -> int | None:
        """How far away, at most, a token of a layer sees another one; None means no such limit."""
        if self.local_attention is None or layer % self.global_every == 0:
            return None
        return self.local_attention // 2

    @property
    def num_encoder_layers(self) -> int:
        """Layers before those of the decoder, of an encoder-decoder."""
        return self.num_layers - (self.num_decoder_layers or self.num_layers // 2)

    @property
    def inner_size(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part multiplies what it makes by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    if TYPE_CHECKING:

        def __hash__(self) -> int:
            """Of all values: pydantic gives it to frozen models, which type checkers do not see."""
            ...


class DataSource(Section):
    """One data set of a mixture."""

    kinds: ClassVar[dict[str, Kind]] = {"path": "execution"}

    name: str = Field(min_length=1, max_length=64)
    """What metrics call it. Part of the seed of its order: sources do not move one another."""
    path: str
    """Folder of token shards that `palimpsest prepare` wrote, or its URL."""
    weight: PositiveFloat | None = None
    """Its share of the samples, relative to the other sources'. None for all: their tokens weigh."""
    epochs: PositiveFloat | None = None
    """It gives no more samples after so many passes; the others go on in their proportions. None: it never ends."""
    max_tokens: PositiveInt | None = None
    """It gives no more samples after so many tokens (whole samples of `sequence_length`). None: it never ends."""


class CacheConfig(Section):
    """Where shards that are read from a URL lie on each node."""

    kind: ClassVar[Kind] = "execution"

    folder: Path
    """Folder on a disk of the node; its ranks, and other runs, share it."""
    bytes: PositiveInt
    """Most bytes that it ever holds: two windows of shards or more."""


class DataConfig(Section):
    """Which token shards a run stage reads, and how documents share a row.

    Folders may move. What the training data holds may not change under a run: the loader's state carries its
    fingerprint. Held-out data is free: another set only begins another curve.
    """

    kinds: ClassVar[dict[str, Kind]] = {
        "train": "execution",
        "validation": "execution",
        "cache": "execution",
        "on_damage": "schedule",
    }

    train: str | None = None
    """Folder of token shards that `palimpsest prepare` wrote, or its URL (s3://, https://, ...). Either this or
    `sources`."""
    sources: tuple[DataSource, ...] = ()
    """Several such folders, mixed sample by sample in exact proportions."""
    temperature: PositiveFloat = 1.0
    """Of sources without weights: each weighs its tokens to the power of 1 / temperature. 1 is in proportion, more is
    closer to equal shares."""
    validation: str | None = None
    """Folder of held-out token shards, or its URL."""
    cache: CacheConfig | None = None
    """Needed where a folder is a URL."""
    window_shards: PositiveInt = 16
    """Samples are shuffled inside windows of this many (shuffled) shards."""
    attention: Literal["document", "row"] = "document"
    """`document`: attention and targets stay inside a document; `row`: documents of one row see each other."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: rows are consecutive stretches of a shard; `best_fit`: documents (longer ones in parts) stay
    whole, each in the row where least room is left."""
    on_damage: Literal["fail", "quarantine"] = "fail"
    """What to do where a shard of the training data turns out to be damaged or missing. `fail`: end the run, on all
    ranks. `quarantine`: all ranks do without its samples from that step on, say so, and keep it in mind over
    restarts."""


class ObjectiveConfig(Section):
    """What is predicted from what. `objective: NAME` alone stands for `objective: {name: NAME}`."""

    name: Literal["causal", "fill_in_the_middle", "masked", "span_corruption"] = "causal"
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """`masked`: rows are pairs of segments; which kind of pair is predicted, too."""
    rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of the tokens that is masked (`masked`) or corrupted (`span_corruption`)."""
    mask_unit: Literal["token", "word", "span"] = "token"
    """`masked`: what is masked as a whole."""
    mask_share: float = Field(default=0.8, ge=0.0, le=1.0)
    """Of the masked tokens, how many the model sees as the mask token; the rest but `random_share` it sees as are."""
    random_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Of the masked tokens, how many the model sees as a random token."""
    mean_span_length: float = Field(default=3.0, ge=1.0)
    """Mean length of a span, in tokens."""
    fill_rate: float = Field(default=0.5, ge=0.0, le=1.0)
    """`fill_in_the_middle`: share of the documents that are rearranged."""
    suffix_first_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Of these, how many have the suffix before the prefix."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Duration(Section):
    """How long a run stage lasts: steps or tokens, not both."""

    kind: ClassVar[Kind] = "schedule"

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None


class ScheduleConfig(Section):
    """Learning rate over a run stage, as a factor of `optimizer.learning_rate`; `engine.optim.schedules` has the
    formulas. Every shape begins with a linear warm-up; a key that a shape does not use keeps its default."""

    kind: ClassVar[Kind] = "schedule"

    shape: Literal["constant", "linear", "cosine", "wsd", "infinite", "rewarm"] = "cosine"
    """`wsd`: warm-up, constant, decay at the end. `infinite`: warm-up, cool-down to a constant, constant, anneal at the
    end. `rewarm`: a cosine that goes on from the factor where an earlier run ended."""
    unit: Literal["steps", "tokens"] = "steps"
    """What the lengths below are counted in."""
    warmup: NonNegativeInt = 0
    """Length of the warm-up."""
    decay: PositiveInt | None = None
    """Length of the decay. `linear`, `cosine` and `rewarm` decay after the warm-up, and None means to the end of the
    stage; `wsd` and `infinite` decay at the end of the stage, and it has to be given."""
    cooldown: NonNegativeInt = 0
    """Length of the cool-down (`infinite`)."""
    initial_factor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Factor that the warm-up begins at (`rewarm`)."""
    constant_factor: float = Field(default=0.5, ge=0.0, le=1.0)
    """Factor of the constant phase (`infinite`)."""
    final_factor: float = Field(default=0.1, ge=0.0, le=1.0)
    """Factor that the decay ends at."""


class SmallerBatch(Section):
    """One entry of a batch-size ramp: a size, and until where it holds."""

    size: PositiveInt
    """Samples per step."""
    until_step: PositiveInt | None = None
    """The number of steps done at which the next size begins."""
    until_tokens: PositiveInt | None = None
    """The next size begins with the first step before which so many tokens are consumed."""


class RunStage(Section):
    """One stage of a run: its data, its batch and its length."""

    name: str = "pretrain"
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    sequence_length: PositiveInt
    """Tokens per sample that the model sees (span corruption: that the encoder sees)."""
    global_batch_size: PositiveInt
    """Samples per step over all ranks; does not change with the layout."""
    batch_ramp: tuple[SmallerBatch, ...] = ()
    """Sizes that come before `global_batch_size`, each until a step or a number of tokens."""
    duration: Duration
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def batches(self) -> Ramp:
        """Samples per step, as a function of the step."""
        ends = [
            (entry.size, entry.until_step or 0, math.ceil((entry.until_tokens or 0) / self.sequence_length))
            for entry in self.batch_ramp
        ]
        return make_ramp(ends, self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of this stage; a length in tokens is rounded up to whole steps."""
        if self.duration.steps is not None:
            return self.duration.steps
        assert self.duration.tokens is not None, "resolve() lets no stage without a length pass"
        return self.batches.steps(math.ceil(self.duration.tokens / self.sequence_length))


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of linear layers and AdamW for the rest (Jordan et
    al. 2024), with decay groups by name."""

    kind: ClassVar[Kind] = "schedule"
    kinds: ClassVar[dict[str, Kind]] = {"name": "meaning"}

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    epsilon: PositiveFloat = 1e-8
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Muon's (the betas are AdamW's)."""
    weight_decay: NonNegativeFloat = 0.1
    no_decay: tuple[str, ...] = ("*.bias", "*norm*")
    """Name patterns (shell style) of parameters without weight decay."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 means no clipping."""


class PrecisionConfig(Section):
    """Number formats. Master weights and moments are always fp32."""

    kind: ClassVar[Kind] = "schedule"

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the working weights and activations."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are accumulated and reduced."""


class ParallelConfig(Section):
    """The layout: how the ranks of a run share the work. Free to change at every start."""

    kind: ClassVar[Kind] = "execution"

    @property
    def shared_by(self) -> int:
        """Tensor ranks that share the time of hidden states between the blocks."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def time_ranks(self) -> int:
        """Ranks that share the time of a row's hidden states, on both axes."""
        return self.shared_by * self.sequence

    pipe: PositiveInt = 1
    """Pipeline stages."""
    tensor: PositiveInt = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Tensor ranks share the time of what lies between the blocks, which tensor parallelism does not split
    (Korthikanti et al. 2022); says nothing where `tensor` is 1."""
    sequence: PositiveInt = 1
    """Ranks that share the time of every row, and exchange heads for time around attention (Jacobs et al. 2023,
    Ulysses). ZeRO shards over them as over data ranks."""
    data: PositiveInt | None = None
    """Data-parallel ranks; None means whatever the world leaves."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over the data axis: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    micro_batch_size: PositiveInt = 1
    """Samples per forward pass of one data rank."""
    schedule: Literal["1f1b", "gpipe", "zb-h1"] = "1f1b"
    """Order of forward and backward passes in the pipeline (`zb-h1` splits the latter); docs/layouts.md says which one
    when."""
    virtual_stages: PositiveInt = 1
    """Chunks of the model that each pipeline stage holds; with several, `1f1b` is interleaved 1F1B."""
    recompute: Recompute = "none"
    """Activation checkpointing: what layers keep for the backward pass. `none`: everything; `selective`: the results of
    matrix products and of attention; `full`: their input. The rest is computed again there."""
    recompute_layers: PositiveInt | None = None
    """Layers of each pipeline stage that recompute, the first ones; None means all."""
    activation_gib: PositiveFloat | None = None
    """Instead of their number: as few layers as keep a stage's activations, as `plan` counts them, within this."""
    gather: Literal["step", "micro_batch"] | None = None
    """How often ZeRO-3 gathers a weight: once per step, and a stage holds all of its weights from then on, or for every
    pass of a micro-batch (the default), and it holds two layers at a time."""
    gather_within: int | None = Field(default=None, ge=2)
    """So many neighbours among ZeRO-3's ranks, those of a node as a rule, keep a second copy of the weights between
    them: a weight is gathered over all ranks once per step, and after that within these (Wang et al. 2023, ZeRO++:
    hpZ)."""
    reduce: Literal["step", "micro_batch"] | None = None
    """How often ZeRO-2 and 3 reduce a gradient: once per step, and a rank holds whole gradients until then, or for
    every micro-batch (the default). ZeRO-0 and 1 do it once per step."""
    offload: Literal["none", "optimizer"] = "none"
    """What lies in host memory: `optimizer`, master weights and moments, which are updated there (ZeRO-1, 2 and 3)."""

    @property
    def gathers_per_step(self) -> bool:
        return self.gather == "step"

    @property
    def reduces_per_step(self) -> bool:
        return self.reduce == "step" or self.zero_stage < 2


class ElasticConfig(Section):
    """What may follow a change of the number of ranks; the global batch never does."""

    kind: ClassVar[Kind] = "execution"

    layout: Literal["data", "any"] = "data"
    """What `palimpsest launch` may change when it restarts a run on fewer ranks: the data axis with the micro-batch,
    or every axis and the ZeRO stage, by the plan's ranking."""
    pad_batch: bool = False
    """Fill a global batch that the data ranks do not divide with rows of weight 0. The numbers stay the same, for
    losses are divided by the weight of all targets; the rows cost their time."""


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


class MemoryConfig(Section):
    """Checkpoints in the memory of the nodes between those on the disk: a node holds its own ranks' files and those of
    the node before it, so that a run outlives any one node without going back to the disk."""

    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt
    """One after every so many steps, except where one goes to the disk or the one before is still under way."""
    folder: Path = Field(default=Path("/dev/shm"), validate_default=False)  # in JSON only text is a path
    """Where a node's memory is a folder. Each file is there four times at the most: of two steps, on two nodes."""


class CheckpointConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt | None = None
    """Save after every so many steps; None means at the end only."""
    asynchronous: bool = True
    """Write beside the training: the step that saves copies to host memory, and the commit follows some steps later.
    One save at a time; the end of a run waits. It takes host memory for one copy of what a rank stores either way."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a save that failed does (no space, no permission): end the run, or be told of on every rank while the run
    goes on to the next one. A run that ends without its last checkpoint has failed either way."""
    keep_last: PositiveInt = 2
    """The newest so many stay. What no `keep_` key keeps is removed, but never the newest verified one."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this stay for ever."""
    keep_best: NonNegativeInt = 0
    """So many with the least `best_metric` stay."""
    best_metric: Literal["validation_loss", "loss"] = "validation_loss"
    """By what `keep_best` judges: the held-out or the training loss of the saved step."""
    memory: MemoryConfig | None = None
    """More of them, in the nodes' memory; a restart of the same job goes on from there. None: on the disk alone."""


class EvaluationConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt | None = None
    """Held-out loss after every so many steps, and at the end; None means at the end only."""
    max_samples: PositiveInt | None = None
    """Held-out samples used; None means all."""


class StabilityConfig(Section):
    """What happens when a step's loss or gradient is not finite, or far above those before it.

    A skipped step leaves weights and optimizer state as they are, bit for bit, and the data moves on.
    """

    kind: ClassVar[Kind] = "schedule"

    non_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient norm is not finite; it never reaches the weights."""
    max_skips: PositiveInt = 10
    """Steps skipped in a row, for whatever reason, that are borne; one more ends the run."""
    spike_sigma: PositiveFloat | None = None
    """Skip a step whose loss or gradient norm is more than so many standard deviations above the mean of the last
    accepted steps; None: never."""
    window: int = Field(default=128, ge=2)
    """Accepted steps that mean and deviation are taken of; no step is a spike before there are so many."""
    rollback_spikes: PositiveInt | None = None
    """Spikes within `rollback_steps` steps after which the run goes back to its newest whole checkpoint and leaves out
    the samples from the first of them on; None: never."""
    rollback_steps: PositiveInt = 10
    """Steps within which these spikes fall."""
    max_rollbacks: int = Field(default=3, ge=1, le=16)
    """Rollbacks of a run; one more ends it."""


class LoggingConfig(Section):
    kind: ClassVar[Kind] = "execution"

    every_steps: PositiveInt = 1
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "palimpsest"
    plot: bool = True
    """Draw the loss curve to `loss.png` in the run folder at the end."""


class RunConfig(Section):
    """Everything that `palimpsest train` needs to know; saved, resolved, in the run folder."""

    kinds: ClassVar[dict[str, Kind]] = {
        "name": "execution",
        "folder": "execution",
        "tokenizer": "execution",
        "checks": "execution",
    }

    name: str = "run"
    folder: Path
    """Run folder: checkpoints, metrics, logs, outcome. Training again with the same folder resumes."""
    seed: NonNegativeInt = 0
    model: ModelConfig
    tokenizer: Path
    """Folder of the tokenizer that the shards were written with."""
    stages: tuple[RunStage, ...] = Field(min_length=1)
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
