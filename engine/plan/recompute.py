"""Which layers of a pipeline stage recompute their activations. Pure arithmetic; training asks here as the plan does.

As in Megatron-LM's block method the first layers of a stage recompute and the others keep everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from engine.config.lengths import has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.plan.cut import stage_parts
from engine.plan.hardware import GIB
from engine.plan.memory import activation_bytes
from engine.plan.parts import Device
from engine.plan.pipeline import in_flight


def recomputed_layers(config: RunConfig, layout: Layout, stage: int, device: Device) -> Sequence[int]:
    """Global numbers of the layers of a stage that recompute on a device; none where `parallel.recompute` is `none`."""
    parallel, lengths = config.parallel, held_lengths(config.stages[0], config.parallel)
    parts = stage_parts(config.model, layout.pipe, parallel.virtual_stages, row_lengths(config.stages[0]))[stage]
    layers = [layer for part in parts for layer in part.layers]
    if parallel.recompute == "none":
        return layers[:0]
    if parallel.activation_gib is None:
        return layers[: parallel.recompute_layers]
    micro_batches = num_micro_batches(config.stages[0].batches.largest, parallel, layout.data)
    passes = in_flight(parallel.schedule, stage, layout.pipe, len(parts), micro_batches)
    alive = Fraction(passes, len(parts))
    segments = has_segments(config.stages[0].data.attention, config.stages[0].objective)
    for count in range(len(layers)):
        needed = activation_bytes(
            config.model, parallel, config.precision, layers, layers[:count], lengths, segments, alive, device
        )
        if needed <= parallel.activation_gib * GIB:
            return layers[:count]
    return layers
