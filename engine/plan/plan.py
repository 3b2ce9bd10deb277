"""The plan of a run on a world: every figure of this room put together for one layout. Pure arithmetic.

Stages differ in layers and parameters, so memory and traffic are per pipeline stage; all ranks of a stage are alike
(padding of partitions, a few elements, is left out).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from engine.config.lengths import has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, examine, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError
from engine.plan.cut import Part, entries_of, layers_of, stage_parts, tied_stages
from engine.plan.elastic import World, elastic_worlds
from engine.plan.families import over_layers
from engine.plan.memory import MASTER_BYTES, MOMENTS_BYTES, MOMENTUM_BYTES, Memory, remade_bytes, stage_memory
from engine.plan.operations import (
    BACKWARD_FACTOR,
    costs_before,
    layer_operations,
    orthogonal_operations,
    training_operations,
)
from engine.plan.parameters import num_parameters
from engine.plan.parts import Device
from engine.plan.pipeline import bubble, in_flight
from engine.plan.recompute import recomputed_layers
from engine.plan.traffic import Traffic, stage_traffic
from engine.plan.worlds import LARGEST_WORLD, Refusal, neighbours, refusal, valid_worlds

WORLDS_SHOWN = 64
"""World sizes are listed up to this, or twice the planned one, ..."""
LARGEST_LISTED = 4096
"""... but no further than this, or the planned one."""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; parameters are elements with the vocabulary padded."""

    stage: int
    chunks: tuple[tuple[int, int], ...]
    """First and last layer of each."""
    num_layers: int
    parameters: int
    """On all its tensor ranks together."""
    parameters_per_rank: int
    """On one tensor rank, before ZeRO divides them."""
    updated: int
    """That one rank's optimizer updates."""
    updated_matrices: int
    """Those of them that Muon updates."""
    stored: int
    """That one rank writes into a checkpoint."""
    stored_matrices: int
    """Those of them that Muon updates, of which there is one moment."""
    operations: int
    """Forward, recomputed and backward of one rank per step, padding of the vocabulary included."""
    recomputed_operations: int
    """What of them is done for the second time: whole layers, where `parallel.recompute` is `full`."""
    remade_bytes: int
    """Activations that are made for the second time per step where it is `selective`, which repeats no product."""
    update_operations: int
    """Of one rank in Muon's update of matrices; 0 for AdamW, whose update is a pass over memory."""
    in_flight: int
    """Forward passes of a chunk alive at the peak."""
    memory: Memory
    traffic: Traffic
    recomputed: int
    """Layers that recompute their activations."""

    @property
    def stored_bytes(self) -> int:
        """What one rank stores in a checkpoint, at the most: moments beside its share of fp32 weights, of a tied matrix
        on its first stage alone. Also the host memory that saves take."""
        one_less = self.stored_matrices * (MOMENTS_BYTES - MOMENTUM_BYTES)
        return self.stored * (MASTER_BYTES + MOMENTS_BYTES) - one_less


@dataclass(frozen=True)
class Plan:
    """What a run costs on a world, per step where nothing else is said; with a ramp, the step of the largest batch."""

    layout: Layout
    zero_stage: int
    parameters: int
    """Real ones: a tied matrix once, no padding."""
    parameters_in_memory: int
    """With padding."""
    num_micro_batches: int
    tokens: int
    operations: int
    """Floating-point operations on all ranks, as utilisation counts them."""
    bubble: float
    stages: tuple[StagePlan, ...]
    worlds: tuple[int, ...]
    """In which the run starts as it is."""
    elastic: tuple[World, ...]
    """In which it can go on with another data axis: those and more."""
    fitting: tuple[Layout, ...]
    refused: tuple[Refusal, ...]

    def node_memory_bytes(self, ranks_per_node: int) -> int:
        """What `checkpoint.memory` takes of a node's memory at the most: two generations, and with several nodes each
        with a copy of the files of another node. Ranks of the stage that stores most on every node."""
        world = self.layout.world_size
        copies = 2 if world > ranks_per_node else 1
        largest = max(stage.stored_bytes for stage in self.stages)
        return 2 * copies * min(ranks_per_node, world) * largest

    @property
    def memory_bytes(self) -> int:
        """What the fullest rank's accelerator has to have."""
        return max(stage.memory.needed for stage in self.stages)

    @property
    def operations_per_token(self) -> int:
        """Of the tokens that a sample is counted by."""
        return self.operations // self.tokens

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        tree = asdict(self)
        tree["operations_per_token"] = self.operations_per_token
        for shown, stage in zip(tree["stages"], self.stages, strict=True):
            shown["memory"] = stage.memory.parts() | {"total": stage.memory.needed}
            shown["host_bytes"] = stage.memory.host
            shown["traffic"]["total"] = stage.traffic.total
            shown["stored_bytes"] = stage.stored_bytes
        tree["elastic"] = [
            {
                "size": world.size,
                "data": world.layout.data,
                "micro_batch_size": world.parallel.micro_batch_size,
                "padded_rows": world.padded_rows,
            }
            for world in self.elastic
        ]
        tree["refused"] = [
            {"problem": str(refused.problem), "layouts": list(refused.layouts)} for refused in self.refused
        ]
        return tree


def make_plan(config: RunConfig, world_size: int, device: Device = "cuda") -> Plan:
    """The plan of `config` on `world_size` ranks, each with a GPU if nothing else is said.

    Raises:
        ConfigError: the run cannot start there.
    """
    if world_size > LARGEST_WORLD:
        raise ConfigError(
            f"a world of {world_size:,} ranks", f"1 to {LARGEST_WORLD:,} ranks", "look at parallel.* and --world"
        )
    layout, problems = examine(config, world_size)
    if problems:
        raise refusal(config, world_size, problems)
    assert layout is not None
    run_stage = config.stages[0]
    batch_size = run_stage.batches.largest
    micro_batches = num_micro_batches(batch_size, config.parallel, layout.data)
    fitting, refused = neighbours(config, world_size)
    largest = max(WORLDS_SHOWN, min(2 * world_size, LARGEST_LISTED), world_size)
    return Plan(
        layout=layout,
        zero_stage=config.parallel.zero_stage,
        parameters=num_parameters(config.model),
        parameters_in_memory=num_parameters(config.model, padded=True),
        num_micro_batches=micro_batches,
        tokens=batch_size * run_stage.sequence_length,
        operations=batch_size * training_operations(config.model, row_lengths(run_stage)),
        bubble=float(bubble(config.parallel.schedule, layout.pipe, config.parallel.chunks_per_stage, micro_batches)),
        stages=stage_plans(config, layout, device),
        worlds=tuple(valid_worlds(config, largest)),
        elastic=tuple(elastic_worlds(config, largest)),
        fitting=tuple(fitting),
        refused=tuple(refused),
    )


def stage_plans(config: RunConfig, layout: Layout, device: Device = "cuda") -> tuple[StagePlan, ...]:
    """Every pipeline stage of a layout that `resolve` or `examine` gave."""
    micro_batches = num_micro_batches(config.stages[0].batches.largest, config.parallel, layout.data)
    lengths = row_lengths(config.stages[0])
    stages = stage_parts(config.model, layout.pipe, config.parallel.chunks_per_stage, lengths)
    return tuple(_stage_plan(config, layout, stage, parts, micro_batches, device) for stage, parts in enumerate(stages))


def _stage_plan(
    config: RunConfig, layout: Layout, stage: int, parts: list[Part], micro_batches: int, device: Device
) -> StagePlan:
    run_stage, lengths = config.stages[0], row_lengths(config.stages[0])
    layers = layers_of(parts)
    entries = entries_of(config.model, parts)
    rows = micro_batches * config.parallel.micro_batch_size
    recomputed = recomputed_layers(config, layout, stage, device)
    alive = in_flight(config.parallel.schedule, stage, layout.pipe, len(parts), micro_batches)
    sections = (config.model, config.parallel, config.precision, entries)
    common: dict[str, Any] = {
        "recomputed": recomputed,
        "data_size": layout.data * layout.sequence,
        "lengths": held_lengths(run_stage, config.parallel),
        "segments": has_segments(run_stage.data.attention, run_stage.objective),
    }
    per_rank = entries.local_numel(layout.tensor)
    costs = costs_before(config.model, lengths)
    operations = (1 + BACKWARD_FACTOR) * sum(costs[part.layers.stop] - costs[part.layers.start] for part in parts)
    again = 0
    if config.parallel.recompute == "full":
        again = over_layers(config.model, recomputed, layer_operations(config.model, lengths).__getitem__)
    share = layout.tensor * layout.sequence
    ties = tied_stages(config.model, layout.pipe, len(parts), lengths)
    elsewhere = frozenset(name for name, holders in ties.items() if holders[0] != stage)
    matrices = entries.linear.local_numel(layout.tensor) if config.optimizer.name == "muon" else 0
    shards = common["data_size"]
    held_by = shards if config.parallel.zero_stage else 1
    remade = remade_bytes(config.model, config.parallel, config.precision, recomputed, lengths)
    return StagePlan(
        stage=stage,
        chunks=tuple((part.layers.start, part.layers.stop - 1) for part in parts),
        num_layers=len(layers),
        parameters=entries.local_numel(1),
        parameters_per_rank=per_rank,
        updated=-(-per_rank // held_by),
        updated_matrices=-(-matrices // held_by),
        stored=-(-entries.without(elsewhere).local_numel(layout.tensor) // shards),
        stored_matrices=matrices // shards,
        operations=(operations + again) * rows // share,
        recomputed_operations=again * rows // share,
        remade_bytes=remade * micro_batches if config.parallel.recompute == "selective" else 0,
        update_operations=orthogonal_operations(entries) // (held_by * layout.tensor) if matrices else 0,
        in_flight=alive,
        memory=stage_memory(
            *sections,
            **common,
            layers=layers,
            in_flight=Fraction(alive, len(parts)),
            has_head=any(part.last for part in parts),
            device=device,
            single_moments=matrices,
        ),
        traffic=stage_traffic(
            *sections,
            **common,
            parts=parts,
            num_micro_batches=micro_batches,
            ties=ties,
            muon=config.optimizer.name == "muon",
        ),
        recomputed=len(recomputed),
    )
