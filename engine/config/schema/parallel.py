"""The sections of the layout: how ranks share the work, and what of it may change with their number."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.schema.section import KeyKind, Section

Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    """The layout: how the ranks of a run share the work. Free to change at every start."""

    kind: ClassVar[KeyKind] = "execution"

    pipe: int = Field(default=1, ge=1, le=1024)
    """Number of pipeline stages."""
    tensor: PositiveInt = 1
    """Number of tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Sequence parallelism: tensor ranks share the sequence dimension of what tensor parallelism does not split,
    between the blocks (Korthikanti et al. 2022). Without effect where `tensor` is 1."""
    sequence: PositiveInt = 1
    """Number of ranks that share the sequence dimension of every row, and exchange heads for it around attention
    (Jacobs et al. 2023, Ulysses). ZeRO shards over them as over data ranks."""
    data: PositiveInt | None = None
    """Number of data-parallel ranks. None means as many as the world leaves."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of ZeRO: 0 shards nothing over the data axis, 1 the optimizer state, 2 gradients as well, 3 weights as
    well."""
    micro_batch_size: int = Field(default=1, ge=1, le=2**16)
    """Number of samples per forward pass of one data rank."""
    schedule: Literal["1f1b", "gpipe", "zb-h1"] = "1f1b"
    """Order of forward and backward passes in the pipeline (`zb-h1` splits the latter); docs/layouts.md says which one
    is for what."""
    chunks_per_stage: PositiveInt = 1
    """Number of chunks of the model that each pipeline stage holds; with several, `1f1b` is interleaved 1F1B."""
    recompute: Recompute = "none"
    """Activation checkpointing: which results layers keep for the backward pass. `none`: all of them; `selective`:
    those of matrix products and of attention; `full`: the layer's input. The others are computed again."""
    recompute_layers: PositiveInt | None = None
    """Number of layers of each pipeline stage that recompute, the first ones. None means all, or as many as
    `activation_gib` asks for."""
    activation_gib: PositiveFloat | None = None
    """Budget in GiB for the activations of a pipeline stage, as `plan` counts them: as few layers recompute as keep
    within it. None means that `recompute_layers` says how many."""
    gather: Literal["step", "micro_batch"] | None = None
    """Frequency at which ZeRO-3 gathers a weight: once per step, and a pipeline stage holds all of its weights from
    then on, or for every pass of a micro-batch, and it holds two layers at a time. None means `micro_batch`."""
    gather_within: int | None = Field(default=None, ge=2)
    """Number of neighbours among ZeRO-3's ranks, those of a node as a rule, that keep a second copy of the weights
    between them: a weight is gathered over all ranks once per step, and after that within these (Wang et al. 2023,
    ZeRO++: hpZ). None means no second copy."""
    reduce: Literal["step", "micro_batch"] | None = None
    """Frequency at which ZeRO-2 and 3 reduce a gradient: once per step, and a rank holds whole gradients until then, or
    for every micro-batch. None means `micro_batch`; ZeRO-0 and 1 always reduce once per step."""
    offload: Literal["none", "optimizer"] = "none"
    """State kept in host memory: `optimizer`, master weights and moments, which are updated there (ZeRO-1, 2 and 3)."""

    @property
    def shared_by(self) -> int:
        """Tensor ranks that share the sequence dimension of hidden states between the blocks."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share the sequence dimension of a row's hidden states, on both axes."""
        return self.shared_by * self.sequence

    @property
    def gathers_per_step(self) -> bool:
        return self.gather == "step"

    @property
    def reduces_per_step(self) -> bool:
        return self.reduce == "step" or self.zero_stage < 2


class ElasticConfig(Section):
    """Changes that may follow a change of the number of ranks; the global batch never changes."""

    kind: ClassVar[KeyKind] = "execution"

    layout: Literal["data", "any"] = "data"
    """Part of the layout that `palimpsest launch` may change when it restarts a run on fewer ranks: the data axis with
    the micro-batch, or every axis and the ZeRO stage, by the plan's ranking."""
    pad_batch: bool = False
    """Padding rows in a global batch that the data ranks do not divide. The numbers stay the same, for losses are
    divided by the weight of all targets; the rows cost their time."""
