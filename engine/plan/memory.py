"""Memory that one rank of a pipeline stage needs, in bytes, by what it is for.

Model states follow Rajbhandari et al. 2020, section 3, with what DeepSpeed holds beyond: from ZeRO-1 on an fp32 run has
a master copy too, gradients are accumulated in `reduce_dtype`, ZeRO-1 keeps the averaged share beside an accumulator of
another dtype, and ZeRO-2 and 3 reduce through a bucket. Activations and logits are an estimate: what autograd saves
per token and layer, without allocator waste; such counts were seen to lie 8 to 11 % below the measured peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from engine.config.deepspeed import reduce_bucket_elements
from engine.config.lengths import RowLengths
from engine.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from engine.plan.families import figures
from engine.plan.parts import Entry

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES = 4
MOMENTS_BYTES = 8
LOGITS_BYTES = 4
"""Losses are computed in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """Working copy."""
    master: int
    """fp32 copy that the optimizer updates; 0 where the working copy is that."""
    moments: int
    gradients: int
    bucket: int
    """Gradients on their way through a reduction."""
    gathered: int
    """ZeRO-3: the largest module, whole while it computes; the largest layer where layers recompute."""
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.master + self.moments + self.gradients + self.bucket

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.logits


def states_per_element(zero_stage: int, data_size: int, precision: PrecisionConfig) -> tuple[Fraction, ...]:
    """Bytes per parameter on one rank for (weights, master, moments, gradients)."""
    share = Fraction(1, data_size)
    weights = Fraction(DTYPE_BYTES[precision.dtype])
    gradients = Fraction(DTYPE_BYTES[precision.reduce_dtype])
    if zero_stage == 0:
        return weights, Fraction(0), Fraction(MOMENTS_BYTES), gradients
    if zero_stage == 1 and precision.dtype != precision.reduce_dtype:
        gradients += gradients * share
    return (
        weights * share if zero_stage == 3 else weights,
        MASTER_BYTES * share,
        MOMENTS_BYTES * share,
        gradients * share if zero_stage >= 2 else gradients,
    )


def stage_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    entries: list[Entry],
    *,
    layers: Sequence[int],
    recomputed: Sequence[int],
    data_size: int,
    lengths: RowLengths,
    in_flight: Fraction | int,
    has_head: bool,
) -> Memory:
    """Memory of one rank of a stage that holds `entries`, with `in_flight` micro-batches of all its layers alive at the
    peak: a fraction where passes of single chunks add up to one.

    `recomputed` are those of its `layers` that recompute their activations.
    """
    numel = sum(entry.local_numel(parallel.tensor) for entry in entries)
    per_element = states_per_element(parallel.zero_stage, data_size, precision)
    weights, master, moments, gradients = (-(-numel * one // 1) for one in per_element)
    rows, dtype_bytes = parallel.micro_batch_size, DTYPE_BYTES[precision.dtype]
    predicted = rows * lengths.predicted if has_head else 0
    logits = predicted * model.padded_vocab_size // parallel.tensor * LOGITS_BYTES
    bucket_bytes = {2: dtype_bytes, 3: DTYPE_BYTES[precision.reduce_dtype]}.get(parallel.zero_stage, 0)
    bucket = reduce_bucket_elements(numel) * bucket_bytes
    gathered = largest_module(entries, parallel.tensor)
    if recomputed:  # the second run of a layer holds its weights until its backward pass is over
        gathered = max(gathered, largest_layer(entries, parallel.tensor))
    return Memory(
        weights=weights,
        master=master,
        moments=moments,
        gradients=gradients,
        bucket=bucket,
        gathered=gathered * dtype_bytes if parallel.zero_stage == 3 else 0,
        activations=activation_bytes(model, parallel, precision, layers, recomputed, lengths, in_flight),
        logits=logits
        * math.ceil(in_flight + 2),  # one saved by each micro-batch alive, two at work: softmax and its gradient
    )


def activation_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    layers: Sequence[int],
    recomputed: Sequence[int],
    lengths: RowLengths,
    alive: Fraction | int,
) -> int:
    """What `alive` micro-batches keep of `layers`, and what one of the `recomputed` has in its second run beside."""
    saved = figures(model).saved
    plain = {layer: saved(model, layer, lengths, parallel.tensor) for layer in layers}
    how = parallel.recompute
    kept = plain | {layer: saved(model, layer, lengths, parallel.tensor, recompute=how) for layer in recomputed}
    second_run = max((plain[layer] - kept[layer] for layer in recomputed), default=0)
    elements = alive * sum(kept.values()) + second_run
    return math.ceil(parallel.micro_batch_size * elements * DTYPE_BYTES[precision.dtype])


def largest_layer(entries: list[Entry], tensor_size: int) -> int:
    """Local elements of the largest layer."""
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.name.startswith("layers."):
            layer = entry.name.split(".")[1]
            sizes[layer] = sizes.get(layer, 0) + entry.local_numel(tensor_size)
    return max(sizes.values())


def largest_module(entries: list[Entry], tensor_size: int) -> int:
    """Local elements of the largest module: what ZeRO-3 gathers at once."""
    sizes: dict[str, int] = {}
    for entry in entries:
        module = entry.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + entry.local_numel(tensor_size)
    return max(sizes.values())
