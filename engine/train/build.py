"""From a configuration to this rank's pipeline stage, ready to train: the one place where the rooms meet.

cut (plan) -> stage on the meta device (models) -> tensor-sharded (parallel) -> parameter groups (optim) -> ZeRO engine
with initial weights -> schedule. Tests build through the same function.
"""

from __future__ import annotations

from functools import partial

import torch

from engine.config.deepspeed import deepspeed_config
from engine.config.lengths import has_segments, row_lengths
from engine.config.resolve import Layout, num_micro_batches
from engine.config.schema import RunConfig, RunStage
from engine.models.chunk import Chunk, Rows
from engine.models.families import family
from engine.models.initial import initial_value
from engine.optim.groups import make_optimizer, parameter_groups
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.groups import Groups, join
from engine.parallel.pipeline import Pipeline
from engine.parallel.tensor import shard, vocabulary_cross_entropy
from engine.parallel.zero import StageEngine
from engine.plan.cut import cut, tied_stages


def build_pipeline(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> Pipeline:
    """This rank's stage with its initial weights and its schedule. Collective over the world."""
    model = config.model
    engine = build_engine(config, run_stage, groups, device)
    engine.fill(partial(initial_value, config=model, seed=config.seed))
    chunk = stage_chunk(config, groups)
    rows = micro_batch_rows(config, run_stage, engine.dtype)
    return Pipeline(
        engine,
        groups,
        incoming={} if chunk.first else family(model).boundary(model, chunk.layers.start, rows),
        outgoing={} if chunk.last else family(model).boundary(model, chunk.layers.stop, rows),
        num_losses=len(family(model).losses(model)),
        schedule=config.parallel.schedule,
    )


def build_engine(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> StageEngine:
    """This rank's stage under ZeRO, its weights still zero. Collective over the world."""
    model, kind = config.model, family(config.model)
    chunk, ties = stage_chunk(config, groups), kind.ties(model)
    specs = {spec.name: spec for spec in kind.specs(model)}
    tied = tied_stages(model, groups.layout.pipe, row_lengths(config.stages[0]))
    with torch.device("meta"):
        stage = kind.build(model, chunk, _functions(groups))
    shard(stage, specs, ties, groups.tensor)
    names = [ties.get(name, name) for name, _ in stage.named_parameters()]
    return StageEngine(
        stage,
        parameter_groups([specs[name] for name in names], config.optimizer, tied),
        ties,
        partial(make_optimizer, config=config.optimizer),
        deepspeed_config(
            config.parallel,
            config.precision,
            config.optimizer,
            num_micro_batches(run_stage.batches.largest, config.parallel, groups.layout.data),
            sum(specs[name].local_numel(groups.tensor.size) for name in names),
        ),
        groups,
        device,
    )


def join_groups(config: RunConfig, layout: Layout, global_rank: int) -> Groups:
    """The groups of a rank, those of the model's tied weights among them. Collective over the world."""
    tied = tied_stages(config.model, layout.pipe, row_lengths(config.stages[0]))
    return join(layout, global_rank, tied.values())


def stage_chunk(config: RunConfig, groups: Groups) -> Chunk:
    """The part of the model that this rank's pipeline stage holds; cut by the lengths of the first run stage."""
    layers = cut(config.model, groups.layout.pipe, row_lengths(config.stages[0]))[groups.coordinates.stage]
    return Chunk(layers, first=groups.is_first_stage, last=groups.is_last_stage)


def micro_batch_rows(config: RunConfig, run_stage: RunStage, dtype: torch.dtype) -> Rows:
    """The shape of the rows that pass through the stages."""
    return Rows(
        num_rows=config.parallel.micro_batch_size,
        length=run_stage.sequence_length,
        dtype=dtype,
        segments=has_segments(run_stage.data.attention, run_stage.objective),
        decoder_length=row_lengths(run_stage).decoder,
    )


def _functions(groups: Groups) -> Functions:
    if groups.tensor.size == 1:
        return PLAIN
    return Functions(linear_cross_entropy=partial(vocabulary_cross_entropy, group=groups.tensor))
