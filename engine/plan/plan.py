"""The plan of a run on a world: every figure of this package put together for one layout. Pure arithmetic.

A run has run stages (parts of its duration), each with its own rows and batches; a layout has pipeline stages (groups
of ranks), each with its own layers. Memory, operations and traffic are figures of a pipeline stage during a run stage;
all ranks of a pipeline stage are alike (padding of partitions, a few elements, is left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.config.kept_moments import kept_moments
from engine.config.objectives import has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, examine, num_micro_batches
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError
from engine.plan.cut import ModelChunk, entries_of, layers_of
from engine.plan.elastic import World, elastic_worlds
from engine.plan.families import over_layers
from engine.plan.frozen import check_patterns, frozen_entries, num_trained, spared_operations, useful_operations
from engine.plan.memory import ADDED_MOMENT_BYTES, MASTER_BYTES, MOMENTS_BYTES, MOMENTUM_BYTES, Memory, remade_bytes
from engine.plan.operations import (
    BACKWARD_FACTOR,
    costs_before,
    layer_operations,
    orthogonal_operations,
)
from engine.plan.parameters import num_parameters
from engine.plan.parts import Device
from engine.plan.pipeline import bubble
from engine.plan.run_stages import PipelineCut, passes_alive, pipeline_cut, pipeline_memory, trained_matrices
from engine.plan.traffic import Traffic, stage_traffic
from engine.plan.worlds import LARGEST_WORLD, Refusal, neighbours, refusal, valid_worlds

WORLDS_SHOWN = 64
"""Largest world size that is always listed."""
LARGEST_LISTED = 4096
"""Largest world size that is listed because it is at most twice the planned one."""


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; parameters are elements with the vocabulary padded."""

    stage: int
    chunks: tuple[tuple[int, int], ...]
    """First and last layer of each."""
    num_layers: int
    parameters: int
    """Parameters on all its tensor ranks together."""
    parameters_per_rank: int
    """Parameters on one tensor rank, before ZeRO divides them."""
    updated: int
    """Parameters that one rank's optimizer updates."""
    updated_matrices: int
    """Parameters among `updated` that Muon updates."""
    stored: int
    """Parameters that one rank writes into a checkpoint."""
    stored_matrices: int
    """Parameters among `stored` that Muon updates, of which there is one moment."""
    stored_frozen: int
    """Parameters among `stored` that are frozen, of which there is the weight alone."""
    added_moments: int
    """Values that the run stage keeps beside each trained parameter and the optimizer's moments."""
    operations: int
    """Forward, recomputed and backward operations of one rank per step, padding of the vocabulary included; with
    distillation the teacher's forward pass, too."""
    recomputed_operations: int
    """Operations among them that are done for the second time: whole layers, where `parallel.recompute` is `full`."""
    remade_bytes: int
    """Activations that are made for the second time per step where it is `selective`, which repeats no product."""
    update_operations: int
    """Operations of one rank in Muon's update of matrices; 0 for AdamW, whose update is a pass over memory."""
    in_flight: int
    """Forward passes of a chunk alive at the peak."""
    memory: Memory
    traffic: Traffic
    recomputed: int
    """Layers that recompute their activations."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that one rank stores in a checkpoint, at the most: moments beside its share of fp32 weights.

        A tied matrix counts on its first stage alone. Also the host memory that saves take."""
        fewer = self.stored_matrices * (MOMENTS_BYTES - MOMENTUM_BYTES) + self.stored_frozen * MOMENTS_BYTES
        added = (self.stored - self.stored_frozen) * self.added_moments * ADDED_MOMENT_BYTES
        return self.stored * (MASTER_BYTES + MOMENTS_BYTES) - fewer + added

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; the parts of the memory add up to its total."""
        return asdict(self) | {
            "memory": self.memory.parts() | {"total": self.memory.needed},
            "host_bytes": self.memory.host,
            "traffic": asdict(self.traffic) | {"total": self.traffic.total},
            "stored_bytes": self.stored_bytes,
        }


@dataclass(frozen=True)
class RunStagePlan:
    """One run stage in a layout, per step; with a ramp, the step of its largest batch."""

    name: str
    num_micro_batches: int
    tokens: int
    operations: int
    """Floating-point operations on all ranks, as utilisation counts them."""
    bubble: float
    """Share of a step in which a pipeline stage waits for others."""
    trained: int
    """Number of parameters that are not frozen."""
    stages: tuple[StagePlan, ...]
    """The pipeline stages."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that the fullest rank's accelerator has to have."""
        return max(stage.memory.needed for stage in self.stages)

    @property
    def operations_per_token(self) -> int:
        """Operations per token of the rows, as `tokens` counts them."""
        return self.operations // self.tokens

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return asdict(self) | {
            "operations_per_token": self.operations_per_token,
            "memory_bytes": self.memory_bytes,
            "stages": [stage.as_json() for stage in self.stages],
        }


@dataclass(frozen=True)
class Plan:
    """Cost of a run on a world."""

    layout: Layout
    zero_stage: int
    parameters: int
    """Parameters of the model: a tied matrix once, without padding."""
    parameters_in_memory: int
    """Parameters with the padding of the vocabulary."""
    run_stages: tuple[RunStagePlan, ...]
    worlds: tuple[int, ...]
    """World sizes in which the run starts as it is."""
    elastic: tuple[World, ...]
    """Worlds in which it can go on with another data axis: those and more."""
    fitting: tuple[Layout, ...]
    refused: tuple[Refusal, ...]

    @property
    def largest(self) -> RunStagePlan:
        """The run stage that needs the most memory on the fullest rank, then on all; the first of equal ones."""

        def needed(run_stage: RunStagePlan) -> tuple[int, int]:
            return run_stage.memory_bytes, sum(stage.memory.needed for stage in run_stage.stages)

        return max(self.run_stages, key=needed)

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """The pipeline stages during the run stage that needs the most memory."""
        return self.largest.stages

    def node_memory_bytes(self, ranks_per_node: int) -> int:
        """Return the bytes that `checkpoint.memory` takes of a node's memory at the most: two generations.

        With several nodes each has a copy of the files of another one, too. All ranks of a node are taken to be of the
        pipeline stage that stores most.
        """
        world = self.layout.world_size
        copies = 2 if world > ranks_per_node else 1
        largest = max(stage.stored_bytes for run_stage in self.run_stages for stage in run_stage.stages)
        return 2 * copies * min(ranks_per_node, world) * largest

    @property
    def memory_bytes(self) -> int:
        """Bytes that the fullest rank's accelerator has to have in the run stage that needs the most."""
        return self.largest.memory_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text: the figures of the run stage that needs the most memory, and those of each."""
        tree = asdict(self) | {"run_stages": [run_stage.as_json() for run_stage in self.run_stages]}
        tree |= {name: value for name, value in self.largest.as_json().items() if name not in ("name", "memory_bytes")}
        tree["largest_run_stage"] = self.largest.name
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
    """Return the plan of `config` on `world_size` ranks, each with a GPU if nothing else is said.

    Raises:
        ConfigError: the run cannot start there.
    """
    if world_size > LARGEST_WORLD:
        raise ConfigError(
            f"a world of {world_size:,} ranks", f"1 to {LARGEST_WORLD:,} ranks", "look at parallel.* and --world"
        )
    layout, problems = examine(config, world_size)
    problems += check_patterns(config)
    if problems:
        raise refusal(config, world_size, problems)
    assert layout is not None
    fitting, refused = neighbours(config, world_size)
    largest = max(WORLDS_SHOWN, min(2 * world_size, LARGEST_LISTED), world_size)
    return Plan(
        layout=layout,
        zero_stage=config.parallel.zero_stage,
        parameters=num_parameters(config.model),
        parameters_in_memory=num_parameters(config.model, padded=True),
        run_stages=run_stage_plans(config, layout, device),
        worlds=tuple(valid_worlds(config, largest)),
        elastic=tuple(elastic_worlds(config, largest)),
        fitting=tuple(fitting),
        refused=tuple(refused),
    )


def run_stage_plans(config: RunConfig, layout: Layout, device: Device = "cuda") -> tuple[RunStagePlan, ...]:
    """Return the plan of every run stage in a layout that `resolve` or `examine` gave."""
    cut = pipeline_cut(config, layout, device)
    return tuple(_run_stage_plan(config, run_stage, layout, cut, device) for run_stage in config.stages)


def _run_stage_plan(
    config: RunConfig, run_stage: RunStage, layout: Layout, cut: PipelineCut, device: Device
) -> RunStagePlan:
    batch_size, parallel = run_stage.batches.largest, config.parallel
    micro_batches = num_micro_batches(batch_size, parallel, layout.data)
    return RunStagePlan(
        name=run_stage.name,
        num_micro_batches=micro_batches,
        tokens=batch_size * run_stage.sequence_length,
        operations=batch_size * useful_operations(config.model, run_stage),
        trained=num_trained(config.model, run_stage.freeze),
        bubble=float(bubble(parallel.schedule, layout.pipe, parallel.chunks_per_stage, micro_batches)),
        stages=stage_plans(config, run_stage, layout, cut, device),
    )


def stage_plans(
    config: RunConfig, run_stage: RunStage, layout: Layout, cut: PipelineCut, device: Device = "cuda"
) -> tuple[StagePlan, ...]:
    """Return the plan of every pipeline stage during a run stage, with the run's `pipeline_cut`."""
    memory = pipeline_memory(config, run_stage, layout, cut.chunks, cut.recomputed, device)
    return tuple(_stage_plan(config, run_stage, layout, stage, cut, held) for stage, held in enumerate(memory))


def _row_operations(
    config: RunConfig, run_stage: RunStage, chunks: Sequence[ModelChunk], recomputed: Sequence[int]
) -> tuple[int, int]:
    """Return the operations that a row costs a pipeline stage, and those of the layers that compute it once more."""
    lengths = row_lengths(run_stage)
    forward = 1 if run_stage.regularization.distillation is None else 2  # the teacher's pass
    # Differences of prefix sums, so that a chunk costs two look-ups however many layers it has.
    costs = costs_before(config.model, lengths)
    once = sum(costs[chunk.layers.stop] - costs[chunk.layers.start] for chunk in chunks)
    again = 0
    if config.parallel.recompute == "full":
        again = over_layers(config.model, recomputed, layer_operations(config.model, lengths).__getitem__)
    spared = spared_operations(config.model, tuple(chunks), lengths, run_stage.freeze)
    return (forward + BACKWARD_FACTOR) * once - spared, again


def _stage_plan(
    config: RunConfig, run_stage: RunStage, layout: Layout, stage: int, cut: PipelineCut, memory: Memory
) -> StagePlan:
    lengths, chunks, recomputed = row_lengths(run_stage), cut.chunks[stage], cut.recomputed[stage]
    micro_batches = num_micro_batches(run_stage.batches.largest, config.parallel, layout.data)
    layers = layers_of(chunks)
    entries = entries_of(config.model, chunks)
    rows = micro_batches * config.parallel.micro_batch_size
    per_rank = entries.local_numel(layout.tensor)
    operations, again = _row_operations(config, run_stage, chunks, recomputed)
    share, distillation = layout.tensor * layout.sequence, run_stage.regularization.distillation
    # A tied parameter is stored by the first of its stages alone.
    elsewhere = frozenset(name for name, holders in cut.ties.items() if holders[0] != stage)
    frozen = frozen_entries(config.model, tuple(chunks), run_stage.freeze)
    trained = per_rank - frozen.local_numel(layout.tensor)
    matrices = trained_matrices(config, run_stage, layout, chunks) if config.optimizer.name == "muon" else 0
    updated = orthogonal_operations(entries) - orthogonal_operations(frozen)
    shards = layout.data * layout.sequence
    held_by = shards if config.parallel.zero_stage else 1
    remade = remade_bytes(config.model, config.parallel, config.precision, recomputed, lengths)
    return StagePlan(
        stage=stage,
        chunks=tuple((chunk.layers.start, chunk.layers.stop - 1) for chunk in chunks),
        num_layers=len(layers),
        parameters=entries.local_numel(1),
        parameters_per_rank=per_rank,
        updated=-(-trained // held_by),
        updated_matrices=-(-matrices // held_by),
        stored=-(-entries.without(elsewhere).local_numel(layout.tensor) // shards),
        stored_matrices=matrices // shards,
        stored_frozen=frozen.without(elsewhere).local_numel(layout.tensor) // shards,
        added_moments=len(kept_moments(config, run_stage)),
        operations=(operations + again) * rows // share,
        recomputed_operations=again * rows // share,
        remade_bytes=remade * micro_batches if config.parallel.recompute == "selective" else 0,
        update_operations=updated // (held_by * layout.tensor) if matrices else 0,
        in_flight=passes_alive(config, run_stage, layout, stage, len(chunks)),
        memory=memory,
        traffic=stage_traffic(
            config.model,
            config.parallel,
            config.precision,
            entries,
            recomputed=recomputed,
            data_size=shards,
            lengths=held_lengths(run_stage, config.parallel),
            segments=has_segments(run_stage.data.attention, run_stage.objective),
            chunks=chunks,
            num_micro_batches=micro_batches,
            ties=cut.ties,
            muon=config.optimizer.name == "muon",
            patterns=run_stage.freeze,
            top_k=distillation.top_k if distillation else 0,
        ),
        recomputed=len(recomputed),
    )
