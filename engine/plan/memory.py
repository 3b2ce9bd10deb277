"""Memory that one rank of a pipeline stage needs, in bytes, by its use.

Model states follow Rajbhandari et al. 2020, section 3, with what DeepSpeed holds beyond: from ZeRO-1 on an fp32 run has
a master copy too, gradients are accumulated in `reduce_dtype`, those that are reduced once per step lie whole beside
their reduced share, and the others go through a bucket. Activations are an estimate: what autograd saves per token and
layer, without an allocator's waste and without what a single operator has at work. `python -m bench.memory` holds the
sum against the tensors that ranks really have (bench/results).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from engine.config.deepspeed import reduce_bucket_elements
from engine.config.objectives import RowLengths
from engine.config.schema.model import ModelConfig
from engine.config.schema.optimizer import PrecisionConfig
from engine.config.schema.parallel import ParallelConfig, Recompute
from engine.plan.families import figures, layer_kinds
from engine.plan.hardware import GIB
from engine.plan.logits import head_bytes
from engine.plan.parts import Device, Entries, needs_masks

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES = 4
MOMENTS_BYTES = 8
"""Adam's two."""
ADDED_MOMENT_BYTES = 4
"""Bytes of each value that a run stage keeps beside a weight and its moments, fp32."""
SOFT_TARGET_BYTES = 8
"""Bytes of a likely token of a teacher, int32, and of its probability, fp32."""
MOMENTUM_BYTES = 4
"""Muon's one, of a matrix."""
HOST_GRADIENT_BYTES = 4
"""Bytes of a gradient on its way to the host's optimizer, fp32."""
RESERVED_BYTES = 3 * GIB
"""Bytes that the driver, the libraries and the communicators take before a tensor is made."""
FRAGMENTED_SHARE = 0.10
"""Bytes lost between tensors in the allocator, as a share of the tensors' own."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """Working copy, and this rank's share of the second one that the ranks of `gather_within` keep."""
    master: int
    """fp32 copy that the optimizer updates; 0 where the working copy is that."""
    moments: int
    added_moments: int
    """Values against forgetting beside the optimizer's moments: first weights, Fisher information, averages."""
    gradients: int
    bucket: int
    """Gradients on their way through a reduction."""
    gathered: int
    """ZeRO-3: two modules, one that computes and the next one; a layer and the next module where layers recompute; with
    `gather: step` the whole stage."""
    activations: int
    logits: int
    """The loss: some rows' logits and their softmax, and the gradients that its forward pass makes; with distillation
    also the likeliest tokens of the step's predictions."""
    host: int = 0
    """Bytes of host memory, in no sum here: with `offload` master weights, moments, gradients, and weights sent back.
    """

    @property
    def states(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.master + self.moments + self.added_moments + self.gradients + self.bucket

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.states + self.gathered + self.activations + self.logits

    @property
    def needed(self) -> int:
        """Bytes that the accelerator has to have: the tensors, those lost between them, and those taken beforehand."""
        return with_reserve(self.total)

    def parts(self) -> dict[str, int]:
        """Return the bytes by name that add up to `needed`."""
        held = {name: value for name, value in asdict(self).items() if name != "host"}
        return held | {"reserve": self.needed - self.total}


def with_reserve(tensor_bytes: int) -> int:
    """Return the bytes that an accelerator needs for `tensor_bytes` of tensors."""
    return int(tensor_bytes * (1 + FRAGMENTED_SHARE)) + RESERVED_BYTES


def states_per_element(parallel: ParallelConfig, data_size: int, precision: PrecisionConfig) -> tuple[Fraction, ...]:
    """Bytes per parameter on one rank for (weights, master, moments, gradients).

    Gradients that are reduced once per step are whole, and beside them lies the reduced share (of several ranks).
    """
    dtypes = DTYPE_BYTES[precision.dtype], DTYPE_BYTES[precision.reduce_dtype]
    return _states_per_element(parallel.zero_stage, parallel.reduces_per_step, data_size, *dtypes)


@lru_cache(maxsize=1024)
def _states_per_element(
    zero_stage: int, reduces_per_step: bool, data_size: int, weight_bytes: int, gradient_bytes: int
) -> tuple[Fraction, ...]:
    # Fractions, for 1 / data_size of a few bytes is no whole number; they are rounded up once, over all elements.
    # bf16 with fp32 gradients on 4 data ranks: ZeRO-1 (2, 1, 2, 4 + 1), ZeRO-3 (1/2, 1, 2, 1) bytes per parameter.
    share, weights, gradients = Fraction(1, data_size), Fraction(weight_bytes), Fraction(gradient_bytes)
    if zero_stage == 0:
        # ZeRO-0 trains in fp32 only (`engine.config.resolve`), so the working copy is the master.
        return weights, Fraction(0), Fraction(MOMENTS_BYTES), gradients
    # The optimizer reads the reduced share from a buffer of its own; one rank alone reads its whole gradient there.
    reduced = gradients * share if data_size > 1 or zero_stage == 3 else Fraction(0)
    return (
        weights * share if zero_stage == 3 else weights,
        MASTER_BYTES * share,
        MOMENTS_BYTES * share,
        gradients + reduced if reduces_per_step else gradients * share,
    )


def host_bytes_per_element(parallel: ParallelConfig, data_size: int, precision: PrecisionConfig) -> Fraction:
    """Bytes per parameter that one rank has in host memory: state, gradient, and the working copy on its way back.

    Under ZeRO-3 in fp32 the masters themselves are what is copied back.
    """
    if parallel.offload == "none":
        return Fraction(0)
    back = 0 if parallel.zero_stage == 3 and precision.dtype == "fp32" else DTYPE_BYTES[precision.dtype]
    return Fraction(MASTER_BYTES + MOMENTS_BYTES + HOST_GRADIENT_BYTES + back, data_size)


def stage_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    entries: Entries,
    *,
    layers: Sequence[int],
    recomputed: Sequence[int],
    data_size: int,
    lengths: RowLengths,
    segments: bool,
    in_flight: Fraction | int,
    has_head: bool,
    device: Device,
    single_moments: int = 0,
    added_moments: int = 0,
    soft_targets: int = 0,
    frozen: int = 0,
    kept: Sequence[int] | None = None,
) -> Memory:
    """Return the memory of one rank of a stage that holds `entries`.

    At the peak `in_flight` micro-batches of all its layers are alive: a fraction where passes of single chunks add up
    to one. Attention keeps what it does on `device`.

    `recomputed` are those of its `layers` that recompute their activations; `segments`: rows hold several documents or
    padding; `single_moments`: local elements of which the optimizer keeps one moment and not two (Muon);
    `added_moments`: values that the run stage keeps beside each trained one; `soft_targets`: tokens that a teacher
    gives for all micro-batches of a step; `frozen`: local elements that have a working copy alone.
    `kept` are the layers that keep activations; None means all.
    """
    numel = entries.local_numel(parallel.tensor)
    trained = numel - frozen
    states = _states(parallel, precision, data_size, numel, trained, single_moments, added_moments)
    dtype_bytes = DTYPE_BYTES[precision.dtype]
    # hpZ's second copy, split over the ranks of one group only (Wang et al. 2023).
    second = -(-numel * dtype_bytes // parallel.gather_within) if parallel.gather_within else 0
    # The head's tokens are split over the sequence axis; tensor ranks gather rows and split the vocabulary instead.
    predicted = parallel.micro_batch_size * lengths.predicted // parallel.sequence if has_head else 0
    return Memory(
        weights=states.weights + second,
        master=states.master,
        moments=states.moments,
        added_moments=states.added_moments,
        gradients=states.gradients,
        bucket=_bucket_bytes(parallel, precision, trained),
        gathered=_gathered_elements(parallel, entries, bool(recomputed)) * dtype_bytes,
        activations=activation_bytes(
            model, parallel, precision, *_with_gradients(layers, recomputed, kept), lengths, segments, in_flight, device
        ),
        logits=head_bytes(model, parallel, predicted, dtype_bytes, math.ceil(in_flight))
        + soft_targets * SOFT_TARGET_BYTES,
        host=states.host,
    )


class _States(NamedTuple):
    """Bytes of a rank's weights and of what is kept beside each: on the device, and `host` on the host."""

    weights: int
    master: int
    moments: int
    added_moments: int
    gradients: int
    host: int


def _states(
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    data_size: int,
    numel: int,
    trained: int,
    single_moments: int,
    added_moments: int,
) -> _States:
    per_element = states_per_element(parallel, data_size, precision)
    counts = (numel, trained, trained, trained)  # of weights, master, moments, gradients
    weights, master, moments, gradients = (
        -(-count * one.numerator // one.denominator) for count, one in zip(counts, per_element, strict=True)
    )
    shards = data_size if parallel.zero_stage else 1
    # `states_per_element` counts Adam's two moments everywhere; Muon keeps one of each matrix.
    moments -= single_moments * (MOMENTS_BYTES - MOMENTUM_BYTES) // shards
    added = -(-trained * added_moments * ADDED_MOMENT_BYTES // shards)
    on_host = math.ceil(trained * host_bytes_per_element(parallel, data_size, precision))
    if parallel.offload == "optimizer":
        on_host += added
        master = moments = added = 0
    return _States(weights, master, moments, added, gradients, on_host)


def _bucket_bytes(parallel: ParallelConfig, precision: PrecisionConfig, trained: int) -> int:
    """Return the bytes of the buffer in which DeepSpeed reduces gradients; none where they are reduced once a step."""
    if parallel.reduces_per_step:
        return 0
    of_element = {2: DTYPE_BYTES[precision.dtype], 3: DTYPE_BYTES[precision.reduce_dtype]}.get(parallel.zero_stage, 0)
    return reduce_bucket_elements(trained) * of_element


def _gathered_elements(parallel: ParallelConfig, entries: Entries, recomputes: bool) -> int:
    """Return the weights that ZeRO-3 has gathered at a time."""
    if parallel.zero_stage < 3:
        return 0
    # With `gather: step` all weights of the stage stay gathered until the step's end.
    if parallel.gathers_per_step:
        return entries.local_numel(parallel.tensor)
    return gathered_at_once(entries, parallel.tensor, recomputes)


def _with_gradients(
    layers: Sequence[int], recomputed: Sequence[int], kept: Sequence[int] | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the layers that keep activations, and those among them that recompute."""
    if kept is None or len(kept) == len(layers):
        return layers, recomputed
    held = frozenset(kept)
    return tuple(kept), tuple(layer for layer in recomputed if layer in held)


def activation_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layers: Sequence[int],
    recomputed: Sequence[int],
    lengths: RowLengths,
    segments: bool,
    alive: Fraction | int,
    device: Device,
) -> int:
    """Return the bytes that `alive` micro-batches keep of `layers`, with those of one recomputed layer's second run.

    Attention never keeps its scores here, as with the kernels of a GPU, unless it has dropout.
    """
    masks = needs_masks(model, precision.dtype, device)
    kept, _, second_run = _kept(
        model, layers, recomputed, lengths, Sharing.of(parallel), parallel.recompute, masks, segments
    )
    # Kept activations multiply with the micro-batches alive, the second run does not: one layer runs at a time.
    elements = alive * kept + second_run
    return math.ceil(parallel.micro_batch_size * elements * DTYPE_BYTES[precision.dtype])


def remade_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recomputed: Sequence[int],
    lengths: RowLengths,
) -> int:
    """Return the bytes of activations of a micro-batch that the `recomputed` layers make again."""
    # Masks are not made again.
    sharing = Sharing.of(parallel)
    _, remade, _ = _kept(
        model, recomputed, recomputed, lengths, sharing, parallel.recompute, masks=False, segments=False
    )
    return math.ceil(parallel.micro_batch_size * remade * DTYPE_BYTES[precision.dtype])


class Sharing(NamedTuple):
    """Numbers of ranks that share the activations of a row, by the way in which they do."""

    tensor: int
    shared_by: int
    sequence: int

    @staticmethod
    def of(parallel: ParallelConfig) -> Sharing:
        return Sharing(parallel.tensor, parallel.shared_by, parallel.sequence)


@lru_cache(maxsize=4096)
def _kept(
    model: ModelConfig,
    layers: Sequence[int],
    recomputed: Sequence[int],
    lengths: RowLengths,
    sharing: Sharing,
    how: Recompute,
    masks: bool,
    segments: bool,
) -> tuple[int, int, int]:
    """Elements per row that (`layers` keep, the `recomputed` ones make again, one of these makes again at the most).

    The `recomputed` ones keep only what `how` says. `masks` is True if the device has no kernel that does without, and
    `segments` if rows hold several documents.
    """
    family, ranks = figures(model), (sharing.tensor, sharing.shared_by)
    own = lengths.shared_by(sharing.sequence)
    # By kind and not by layer: a stage has a few kinds however deep it is. `recomputed` is a subset of `layers`.
    again = {family.layer_kind(model, kind.example): kind.count for kind in layer_kinds(model, recomputed)}
    kept, remade, most = 0, 0, 0
    for layer, count in layer_kinds(model, layers):
        pairs = family.mask(model, layer, lengths, masks, segments)  # of whole rows
        plain = family.saved(model, layer, own, *ranks) + pairs
        kept += count * plain
        if repeated := again.get(family.layer_kind(model, layer), 0):
            spared = plain - family.saved(model, layer, own, *ranks, how)
            kept -= repeated * spared
            remade += repeated * spared
            most = max(most, spared)
    return kept, remade, most


@lru_cache(maxsize=4096)
def gathered_at_once(entries: Entries, tensor_size: int, recomputes: bool) -> int:
    """Largest number of local elements that ZeRO-3 holds gathered at once.

    That is the two largest modules, for one is gathered while the one before it computes; or one layer, whose second
    run holds its weights until its backward pass is over, and one module.
    """
    layers: dict[str, int] = {}
    modules: dict[str, int] = {}
    alike: dict[str, int] = {}
    for entry in entries:
        module, numel = entry.name.rpartition(".")[0], entry.local_numel(tensor_size)
        modules[module] = modules.get(module, 0) + numel
        alike[module] = entry.count
        if module.startswith("layers."):
            layer = module.split(".")[1]
            layers[layer] = layers.get(layer, 0) + numel
    # An entry stands for all equal layers (`count`); the two largest modules may both be of one kind, but no more.
    sizes = [numel for module, numel in modules.items() for _ in range(min(alike[module], 2))]
    # The 0 is the second one of a stage that has a single module.
    *_, second, largest = [0, *sorted(sizes)]
    return max(second + largest, max(layers.values()) + largest if recomputes else 0)
