"""Which layers of a pipeline stage recompute their activations. Pure arithmetic; training asks here as the plan does.

As in Megatron-LM's block method the first layers of a stage recompute and the others keep everything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

from engine.config.lengths import has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.plan.cut import layers_of, stage_parts
from engine.plan.hardware import GIB
from engine.plan.memory import activation_bytes
from engine.plan.parts import Device
from engine.plan.pipeline import in_flight


def recomputed_layers(config: RunConfig, layout: Layout, stage: int, device: Device) -> Sequence[int]:
    """Global numbers of the layers of a stage that recompute on a device; none where `parallel.recompute` is `none`."""
    parallel, lengths = config.parallel, held_lengths(config.stages[0], config.parallel)
    parts = stage_parts(config.model, layout.pipe, parallel.chunks_per_stage, row_lengths(config.stages[0]))[stage]
    layers = layers_of(parts)
    if parallel.recompute == "none":
        return layers[:0]
    if parallel.activation_gib is None:
        return layers[: parallel.recompute_layers]
    micro_batches = num_micro_batches(config.stages[0].batches.largest, parallel, layout.data)
    passes = in_flight(parallel.schedule, stage, layout.pipe, len(parts), micro_batches)
    alive = Fraction(passes, len(parts))
    segments = has_segments(config.stages[0].data.attention, config.stages[0].objective)
    budget = parallel.activation_gib * GIB

    def holds(count: int) -> bool:
        """Whether the activations keep to the budget; never false again for more layers, as no fewer than one
        micro-batch is alive, and each layer adds at most what it spares to what one of them has at work."""
        needed = activation_bytes(
            config.model, parallel, config.precision, layers, layers[:count], lengths, segments, alive, device
        )
        return needed <= budget

    return layers[: bisect_left(range(len(layers)), True, key=holds)]
