"""Bytes that one rank sends in a step, by collective: the formulas of what is built, for rings.

A ring over n ranks sends (n-1)/n of the tensor per rank for a gather or a scatter and twice that for an all-reduce
(Patarasuk and Yuan 2009). Left out are scalars (norms, losses, counts), and what fills up the flat buffers of ZeRO-1
and 2: fewer than 2 x data ranks numbers for each group of weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

from engine.config.objectives import RowLengths
from engine.config.parameter_patterns import matches
from engine.config.schema.model import ModelConfig
from engine.config.schema.optimizer import PrecisionConfig
from engine.config.schema.parallel import ParallelConfig
from engine.plan.cut import ModelChunk, layers_of
from engine.plan.families import figures, over_layers
from engine.plan.frozen import front_entries, frozen_entries, receives_gradients
from engine.plan.memory import DTYPE_BYTES
from engine.plan.parameters import counted_entries
from engine.plan.parts import Entries, Entry, of_each_head

LOSS_REDUCTIONS = 3
"""Per token over the tensor axis: largest logit, sum of exponentials, the target's logit; fp32."""

UPDATE_BYTES = 4
"""Bytes of an element of Muon's update, fp32."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of a stage sends per step."""

    gradients: int
    """Data axis: gradients to the ranks that update them."""
    weights: int
    """Data axis: updated weights (ZeRO-1, 2), or weights gathered for each pass (ZeRO-3)."""
    weights_within: int
    """Data axis: weights exchanged between the ranks of `gather_within`."""
    tensor: int
    """Tensor axis: activations and their gradients; and gradients of parameters that see a rank's tokens only."""
    sequence: int
    """Sequence axis: the exchange of heads for tokens around attention, and back (Ulysses)."""
    pipe: int
    """Neighbouring stages, the last and the first among them: boundary activations, document numbers, and gradients."""
    tie: int
    """Stages that hold a weight together: its gradient."""
    updates: int = 0
    """Data and sequence axes: Muon's updates to the ranks that orthogonalise them and back, on average over ranks."""
    updates_across: int = 0
    """Tensor axis: Muon's updates."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def stage_traffic(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    entries: Entries,
    *,
    chunks: Sequence[ModelChunk],
    recomputed: Sequence[int],
    data_size: int,
    lengths: RowLengths,
    num_micro_batches: int,
    segments: bool,
    ties: Mapping[str, tuple[int, ...]],
    muon: bool = False,
    patterns: tuple[str, ...] = (),
    top_k: int = 0,
) -> Traffic:
    """Return the traffic of one rank of a stage that holds `chunks`, whose parameters are `entries`.

    `ties` are the stages of those that several hold. `muon` updates the matrices. Parameters that the `patterns` freeze
    have no gradient; nothing goes back up to a chunk in front of which nothing is trained.

    `top_k` is the number of likeliest tokens that a teacher's forward pass gives for each prediction; 0 means that
    there is none. It has the same modules, whose weights are exchanged before and after it.

    `recomputed` are the layers among them that recompute their activations. `segments`: rows carry document numbers,
    which travel down the pipeline with the activations.
    """
    stage = _Stage(
        model,
        parallel,
        precision,
        entries,
        tuple(chunks),
        recomputed,
        data_size,
        lengths.shared_by(parallel.sequence),
        num_micro_batches,
        patterns,
        top_k,
    )
    # document numbers alone travel whole, whatever the sequence axis
    whole = sum(figures(model).carried_bytes(model, layer, lengths, segments) for layer in stage.down)
    gradients, weights, within = _data_bytes(stage)
    sums, partial, exchanged = _layer_elements(stage)
    return Traffic(
        gradients=gradients,
        weights=weights,
        weights_within=within,
        tensor=gather_bytes(sums + 2 * partial * DTYPE_BYTES[precision.reduce_dtype], parallel.tensor),
        sequence=gather_bytes(exchanged // parallel.tensor * stage.dtype_bytes, parallel.sequence),
        pipe=stage.rows * _pipe_bytes(stage, whole),
        tie=_tie_bytes(entries, _trained(ties, patterns), parallel, precision, data_size),
        **(_muon_bytes(entries, stage.frozen, parallel, data_size) if muon else {}),
    )


@dataclass(frozen=True)
class _Stage:
    """Sizes that the traffic of one rank of a pipeline stage follows from."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    entries: Entries
    chunks: tuple[ModelChunk, ...]
    recomputed: Sequence[int]
    data_size: int
    lengths: RowLengths
    """Of a rank's part of each row."""
    num_micro_batches: int
    patterns: tuple[str, ...]
    top_k: int

    @property
    def rows(self) -> int:
        return self.num_micro_batches * self.parallel.micro_batch_size

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.precision.dtype]

    @property
    def has_teacher(self) -> bool:
        return self.top_k > 0

    @property
    def has_head(self) -> bool:
        return any(chunk.last for chunk in self.chunks)

    @cached_property
    def frozen(self) -> Entries:
        return frozen_entries(self.model, self.chunks, self.patterns)

    @property
    def filled(self) -> int:
        """Number of ranks that ZeRO-3 divides each parameter over, padded; 1 without."""
        return self.data_size if self.parallel.zero_stage == 3 else 1

    @property
    def down(self) -> list[int]:
        """Boundaries that activations are sent over, each named by the layer behind it."""
        return [chunk.layers.stop for chunk in self.chunks if not chunk.last]

    @property
    def up(self) -> list[int]:
        """Boundaries that gradients are sent back over: not where nothing in front of a chunk is trained."""
        starts = (chunk.layers.start for chunk in self.chunks if not chunk.first)
        return [start for start in starts if receives_gradients(self.model, start, self.patterns)]


def _pipe_bytes(stage: _Stage, carried: int) -> int:
    """Bytes of a row sent to neighbouring stages, `carried` of them document numbers."""
    parallel = stage.parallel

    def sent(boundaries: Sequence[int]) -> int:
        # Every tensor rank sends to its neighbour: all of a whole hidden state, or its own tokens of a shared one.
        elements = sum(figures(stage.model).boundary(stage.model, layer, stage.lengths) for layer in boundaries)
        return elements * stage.dtype_bytes // parallel.shared_by

    total = sent([*stage.up, *stage.down]) + carried
    # a teacher's pass: down once more, with no gradients that come back
    return total + sent(stage.down) + carried if stage.has_teacher else total


def _data_bytes(stage: _Stage) -> tuple[int, int, int]:
    """Bytes over the data axis: gradients, weights, and weights within the ranks of `gather_within`."""
    parallel, size = stage.parallel, stage.data_size
    numel = stage.entries.local_numel(parallel.tensor, stage.filled)
    trained = numel - stage.frozen.local_numel(parallel.tensor, stage.filled)
    gradients, weights = zero_bytes(trained, parallel, size, stage.precision, stage.num_micro_batches)
    if parallel.zero_stage == 3:  # frozen weights are gathered as well
        _, weights = zero_bytes(numel, parallel, size, stage.precision, stage.num_micro_batches)
    if parallel.zero_stage == 3 and not parallel.gathers_per_step:
        # Weights are dropped after each use: gathered for the forward and for the backward pass of every micro-batch.
        used = _used(stage.model, stage.chunks, parallel.tensor, stage.filled)
        # modules in front of all that is trained have no backward pass
        front = front_entries(stage.model, stage.chunks, stage.patterns).local_numel(parallel.tensor, stage.filled)
        passes = stage.num_micro_batches * (2 * used - front + (used if stage.has_teacher else 0))
        # each parameter once after each change of the weights, or every pass
        over_all = numel * (2 if stage.has_teacher else 1) if parallel.gather_within else passes
        within = gather_bytes((passes - over_all) * stage.dtype_bytes, parallel.gather_within or 1)
        return gradients, gather_bytes(over_all * stage.dtype_bytes, size), within
    if stage.has_teacher and parallel.zero_stage > 0:
        # ZeRO-3 gathers all once more; the others complete what was exchanged, before and after the teacher's pass
        once = numel if parallel.zero_stage == 3 else 2 * trained
        weights += gather_bytes(once * stage.dtype_bytes, size)
    return gradients, weights, 0


def _layer_elements(stage: _Stage) -> tuple[int, int, int]:
    """Return bytes of what tensor ranks gather of activations, elements of gradients that they reduce, and elements
    that sequence ranks exchange; all of a step."""
    parallel, lengths, teacher = stage.parallel, stage.lengths, stage.has_teacher
    # Three fp32 numbers per predicted token stand for the vocabulary's logits, which are never gathered.
    predicted = lengths.predicted if stage.has_head else 0
    losses = LOSS_REDUCTIONS * 4 * predicted
    # The divergence is reduced with them; the likeliest tokens of each rank are gathered, as fp32 and int64.
    likeliest = (2 * 4 + stage.top_k * (4 + 8) * parallel.tensor) * predicted if teacher else 0
    passed = _passed(stage.model, stage.chunks, stage.recomputed, lengths)
    activations = 2 * (passed.reduced + passed.again)  # an all-reduce is two rounds, each of (n-1)/n of the tensor
    activations += passed.reduced if teacher else 0  # forward alone: half of them
    if parallel.shared_by > 1:
        # an all-reduce is a gather and a scatter; beside, what enters is gathered once more backward, and in a second
        # run, which only scatters what leaves; the head reads whole rows
        read = (lengths.decoder or lengths.tokens) * stage.model.hidden_size if stage.has_head else 0
        activations += passed.entered - passed.again + read
    shared_by = parallel.shared_by
    partial = _partial(stage.model, stage.entries, shared_by) - _partial(stage.model, stage.frozen, shared_by)
    # From ZeRO-1 on gradients are scattered over the data axis first, and each rank reduces its shard only.
    partial = partial if parallel.zero_stage == 0 else -(-partial // stage.data_size)
    sums = stage.rows * (activations * stage.dtype_bytes + 2 * losses + likeliest)
    exchanged = passed.exchanged + (passed.exchanged_forward if teacher else 0)
    return sums, partial, stage.rows * exchanged


def _trained(ties: Mapping[str, tuple[int, ...]], patterns: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    return {name: stages for name, stages in ties.items() if not matches(name, patterns)}


class Passed(NamedTuple):
    """Elements of a row's activations and their gradients that a stage's tensor and sequence ranks send each other."""

    reduced: int
    again: int
    """Reduced once more, in the second run of layers that recompute."""
    exchanged: int
    exchanged_forward: int
    """Those among `exchanged` of one forward pass."""
    entered: int


@lru_cache(maxsize=4096)
def _passed(
    model: ModelConfig, chunks: tuple[ModelChunk, ...], recomputed: Sequence[int], lengths: RowLengths
) -> Passed:
    family, layers = figures(model), layers_of(chunks)

    def total(figure: Callable[[ModelConfig, int, RowLengths], int], of: Sequence[int]) -> int:
        return over_layers(model, of, lambda layer: figure(model, layer, lengths))

    return Passed(
        reduced=sum(family.reduced(model, chunk.layers, chunk.first, chunk.last, lengths) for chunk in chunks),
        again=total(family.reduced_again, recomputed),
        # forward, backward, and in the second run of those that recompute
        # an all-to-all sends (n-1)/n of its tensor as a gather does:
        exchanged=2 * total(family.exchanged, layers) + total(family.exchanged, recomputed),
        exchanged_forward=total(family.exchanged, layers),
        entered=total(family.entered, layers) + total(family.entered, recomputed),
    )


@lru_cache(maxsize=4096)
def _used(model: ModelConfig, chunks: tuple[ModelChunk, ...], tensor_size: int, filled: int) -> int:
    """Local elements of all modules; a parameter that two of them use counts twice, because each gathers it."""
    used = [entry for chunk in chunks for entry in counted_entries(model, chunk.layers, chunk.first, chunk.last)]
    return Entries(tuple(used)).local_numel(tensor_size, filled)


@lru_cache(maxsize=4096)
def _partial(model: ModelConfig, entries: Entries, shared_by: int) -> int:
    """Elements of parameters that every tensor rank holds and that see its own heads only, or its own tokens
    (sequence parallelism, `shared_by` above 1).

    Their gradients are sums over the heads or over the row, so the tensor ranks all-reduce them."""
    whole = figures(model).sees_whole_rows
    held = [entry for entry in entries if not entry.split]
    found = [entry for entry in held if of_each_head(entry.name) or (shared_by > 1 and not whole(entry.name))]
    return sum(entry.numel * entry.count for entry in found)


@lru_cache(maxsize=4096)
def _named(entries: Entries, names: tuple[str, ...]) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries if entry.name in names)


def zero_bytes(
    numel: int, parallel: ParallelConfig, data_size: int, precision: PrecisionConfig, num_micro_batches: int
) -> tuple[int, int]:
    """Return the bytes for (gradients, weights) over the data axis, for `numel` local parameters.

    Gradients: ZeRO-0 all-reduces them, the others scatter them once per step or per micro-batch; for ZeRO-2 per
    micro-batch DeepSpeed all-reduces. Weights: ZeRO-1 and 2 gather the updated ones, ZeRO-3 all of them once per step,
    or twice per micro-batch.
    """
    reductions = 1 if parallel.reduces_per_step else num_micro_batches
    # Forward and backward: DeepSpeed frees a weight after either (`stage3_max_reuse_distance` is 0).
    gathers = 1 if parallel.gathers_per_step or parallel.zero_stage < 3 else 2 * num_micro_batches
    gradient_bytes = numel * DTYPE_BYTES[precision.reduce_dtype]
    weight_bytes = numel * DTYPE_BYTES[precision.dtype]
    all_reduces = parallel.zero_stage == 0 or (parallel.zero_stage == 2 and not parallel.reduces_per_step)
    gradients = gather_bytes(reductions * gradient_bytes * (2 if all_reduces else 1), data_size)
    return gradients, gather_bytes(gathers * weight_bytes, data_size) if parallel.zero_stage > 0 else 0


def gather_bytes(total_bytes: int, size: int) -> int:
    """Return the bytes that each of `size` ranks sends to gather or scatter so many bytes; an all-reduce is both."""
    return total_bytes * (size - 1) // size


def gather_factor(size: int) -> Fraction:
    """Share of the tensor that each of `size` ranks sends in an all-gather or a reduce-scatter."""
    return Fraction(size - 1, size)


def all_reduce_factor(size: int) -> Fraction:
    """Bytes that each rank sends for an all-reduce, as a multiple of the tensor's: 2 (n-1) / n."""
    return 2 * gather_factor(size)


def _tie_bytes(
    entries: Entries,
    ties: Mapping[str, tuple[int, ...]],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    data_size: int,
) -> int:
    """Bytes that a rank sends so that the stages of each tie sum its gradient: of the shard that the rank updates."""
    total = Fraction(0)
    for entry in _named(entries, tuple(ties)):
        numel = entry.local_numel(parallel.tensor)
        own = numel if parallel.zero_stage == 0 else -(-numel // data_size)
        total += own * all_reduce_factor(len(ties[entry.name]))
    return int(total * DTYPE_BYTES[precision.reduce_dtype])


def _muon_bytes(entries: Entries, frozen: Entries, parallel: ParallelConfig, data_size: int) -> dict[str, int]:
    """Bytes of Muon's updates, fp32: the shards of a matrix go to its one owner and come back (`Owners` in
    `engine.optim.muon`). A rank sends the shards that others own and returns those of its own matrices.

    The mean over ranks is exact where each has an equal shard of every matrix: under ZeRO-3, and over the tensor axis.
    ZeRO-1 and 2 cut all of a stage's parameters in a row, so that some matrices lie with their owner whole, and the
    owner of others holds none of them.
    """
    owners = data_size if parallel.zero_stage else 1  # ZeRO-0 leaves the whole gradient with every rank
    trained = entries.linear.local_numel(parallel.tensor) - frozen.linear.local_numel(parallel.tensor)
    share = trained * UPDATE_BYTES // owners
    # Twice: there and back. Over the ZeRO ranks a tensor rank's part is completed, over the tensor axis the matrix.
    return {"updates": 2 * gather_bytes(share, owners), "updates_across": 2 * gather_bytes(share, parallel.tensor)}
