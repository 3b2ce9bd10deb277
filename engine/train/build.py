"""From a configuration to this rank's pipeline stage, ready to train: the one place where the rooms meet.

cut (plan) -> chunks on the meta device (models) -> tensor-sharded (parallel) -> parameter groups (optim) -> ZeRO engine
with initial weights -> schedule. Tests build through the same function.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from engine.config.deepspeed import deepspeed_config
from engine.config.objectives import has_segments, held_lengths, row_lengths
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema.model import ModelConfig
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.models.chunk import Chunk, Rows
from engine.models.families import family
from engine.models.initial import initial_value
from engine.optim.groups import make_optimizer, parameter_groups, refuse_unmatched
from engine.parallel.chunks import Chunks
from engine.parallel.functions import PLAIN, Functions, Time
from engine.parallel.groups import Groups, join
from engine.parallel.pipeline import Pipeline, Ports
from engine.parallel.recompute import recompute
from engine.parallel.sharding import ParameterSpec
from engine.parallel.tensor import shard, vocabulary_cross_entropy, whole_rows
from engine.parallel.ulysses import sequence_attention
from engine.parallel.zero import StageEngine
from engine.plan.cut import stage_parts, tied_stages
from engine.plan.families import figures
from engine.plan.run_stages import recomputed_layers


def build_pipeline(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> Pipeline:
    """This rank's stage with its initial weights and its schedule. Collective over the world."""
    model = config.model
    engine = build_engine(config, run_stage, groups, device)
    engine.fill(partial(initial_value, config=model, seed=config.seed))
    return Pipeline(
        engine,
        groups,
        stage_ports(config, run_stage, groups, engine.dtype),
        num_losses=len(family(model).losses(model)),
        schedule=config.parallel.schedule,
    )


def stage_ports(config: RunConfig, run_stage: RunStage, groups: Groups, dtype: torch.dtype) -> list[Ports]:
    """Return what goes into and out of each chunk of this rank, for the rows of a run stage."""
    rows = micro_batch_rows(config, run_stage, dtype)
    return [_ports(config.model, chunk, rows) for chunk in stage_chunks(config, groups)]


def build_engine(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> StageEngine:
    """This rank's stage under ZeRO, its weights still zero. Collective over the world."""
    model, kind = config.model, family(config.model)
    specs = {spec.name: spec for spec in kind.specs(model)}
    refuse_unmatched(config.stages, specs)
    with torch.device("meta"):
        chunks = [
            kind.build(model, chunk, _functions(config.parallel, groups)) for chunk in stage_chunks(config, groups)
        ]
    stage = Chunks(chunks, kind.ties(model))
    logical_names = stage.logical_names(kind.ties(model))
    shard(stage, specs, logical_names, groups.tensor, stretches=config.parallel.shared_by > 1)
    on = "cuda" if device.type == "cuda" else "cpu"
    _recompute(config, chunks, recomputed_layers(config, groups.layout, groups.coordinates.stage, on))
    names = [logical_names[name] for name, _ in stage.named_parameters()]
    partial_gradients = _partial_gradients(config, specs.values())
    tied = _tied_stages(config, groups.layout)
    return StageEngine(
        stage,
        parameter_groups([specs[name] for name in names], config.optimizer, tied, partial_gradients, config.stages),
        logical_names,
        partial(make_optimizer, config=config.optimizer),
        deepspeed_config(
            config.parallel,
            config.precision,
            config.optimizer,
            num_micro_batches(run_stage.batches.largest, config.parallel, groups.layout.data),
            sum(specs[name].local_numel(groups.tensor.size) for name in names),
        ),
        config.parallel,
        groups,
        device,
    )


def join_groups(config: RunConfig, layout: Layout, global_rank: int) -> Groups:
    """The groups of a rank, those of the model's tied weights among them. Collective over the world."""
    parallel = config.parallel
    tied = _tied_stages(config, layout).values()
    limit_seconds = config.launch.collective_limit_seconds
    return join(layout, global_rank, tied, parallel.chunks_per_stage, parallel.gather_within, limit_seconds)


def stage_chunks(config: RunConfig, groups: Groups) -> list[Chunk]:
    """The parts of the model that this rank's pipeline stage holds; cut by the lengths of the first run stage."""
    sizes = (groups.layout.pipe, config.parallel.chunks_per_stage)
    parts = stage_parts(config.model, *sizes, row_lengths(config.stages[0]))[groups.coordinates.stage]
    return [Chunk(part.layers, part.first, part.last) for part in parts]


def _tied_stages(config: RunConfig, layout: Layout) -> Mapping[str, tuple[int, ...]]:
    return tied_stages(config.model, layout.pipe, config.parallel.chunks_per_stage, row_lengths(config.stages[0]))


def _ports(model: ModelConfig, chunk: Chunk, rows: Rows) -> Ports:
    kind = family(model)
    return Ports(
        wanted=kind.wanted(model, chunk),
        incoming={} if chunk.first else kind.boundary(model, chunk.layers.start, rows),
        outgoing={} if chunk.last else kind.boundary(model, chunk.layers.stop, rows),
    )


def micro_batch_rows(config: RunConfig, run_stage: RunStage, dtype: torch.dtype) -> Rows:
    """The shape of the rows that pass through the stages."""
    return Rows(
        num_rows=config.parallel.micro_batch_size,
        length=run_stage.sequence_length,
        dtype=dtype,
        segments=has_segments(run_stage.data.attention, run_stage.objective),
        decoder_length=held_lengths(run_stage, config.parallel).decoder,
        shared_by=config.parallel.time_ranks,
    )


def _functions(parallel: ParallelConfig, groups: Groups) -> Functions:
    functions = PLAIN
    if parallel.tensor > 1:
        loss = partial(vocabulary_cross_entropy, group=groups.tensor)
        functions = replace(functions, linear_cross_entropy=loss, tensor_rank=groups.tensor.position)
    if parallel.shared_by > 1:
        functions = replace(functions, whole_rows=partial(whole_rows, group=groups.tensor))
    if parallel.sequence > 1:
        functions = replace(functions, attention=partial(sequence_attention, group=groups.sequence))
    time = Time(groups.sequence.position, groups.sequence.size, parallel.shared_by)
    return replace(functions, time=time)


def _partial_gradients(config: RunConfig, specs: Iterable[ParameterSpec]) -> frozenset[str]:
    """The parameters that every tensor rank holds whole and sees a stretch of the rows' time of."""
    if config.parallel.shared_by == 1:
        return frozenset()
    replicated = [spec.name for spec in specs if spec.sharding.dim is None]
    return frozenset(name for name in replicated if not figures(config.model).sees_whole_rows(name))


def _recompute(config: RunConfig, chunks: Sequence[nn.Module], layers: Container[int]) -> None:
    """Makes the chunks' layers of these global numbers recompute; a family keeps its layers in `layers`."""
    if config.parallel.recompute != "none":
        held = [item for chunk in chunks for item in chunk.get_submodule("layers").named_children()]
        recompute([layer for number, layer in held if int(number) in layers], config.parallel.recompute)
