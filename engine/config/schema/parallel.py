"""The sections of the layout: how ranks share the work, and what of it may change with their number."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.schema.section import Kind, Section

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    """The layout: how the ranks of a run share the work. Free to change at every start."""

    kind: ClassVar[Kind] = "execution"

    pipe: int = Field(default=1, ge=1, le=1024)
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
    micro_batch_size: int = Field(default=1, ge=1, le=2**16)
    """Samples per forward pass of one data rank."""
    schedule: Literal["1f1b", "gpipe", "zb-h1"] = "1f1b"
    """Order of forward and backward passes in the pipeline (`zb-h1` splits the latter); docs/layouts.md says which one
    when."""
    chunks_per_stage: PositiveInt = 1
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
    def shared_by(self) -> int:
        """Tensor ranks that share the time of hidden states between the blocks."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def time_ranks(self) -> int:
        """Ranks that share the time of a row's hidden states, on both axes."""
        return self.shared_by * self.sequence

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
