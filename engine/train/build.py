"""From a configuration to this rank's pipeline stage, ready to train: the one place where the rooms meet.

cut (plan) -> stage on the meta device (models) -> tensor-sharded (parallel) -> parameter groups (optim) -> ZeRO engine
with initial weights -> schedule. Tests build through the same function.

Legend: B micro-batch size, T time, D width.
"""

from __future__ import annotations

from functools import partial

import torch

from engine.config.deepspeed import deepspeed_config
from engine.config.resolve import num_micro_batches
from engine.config.schema import ModelConfig, RunConfig, RunStage
from engine.models import gpt
from engine.models.chunk import Chunk
from engine.models.initial import initial_value
from engine.optim.groups import adamw, parameter_groups
from engine.parallel.functions import PLAIN, Functions
from engine.parallel.groups import Groups
from engine.parallel.pipeline import Boundary, Field, Pipeline
from engine.parallel.tensor import shard, vocabulary_cross_entropy
from engine.parallel.zero import StageEngine
from engine.plan.cut import cut


def build_pipeline(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> Pipeline:
    """This rank's stage with its initial weights and its schedule. Collective over the world."""
    engine = build_engine(config, run_stage, groups, device)
    engine.fill(partial(initial_value, config=config.model, seed=config.seed))
    boundary = stage_boundary(config.model, run_stage, config.parallel.micro_batch_size, engine.dtype)
    return Pipeline(engine, groups, boundary, config.parallel.schedule)


def build_engine(config: RunConfig, run_stage: RunStage, groups: Groups, device: torch.device) -> StageEngine:
    """This rank's stage under ZeRO, its weights still zero. Collective over the world."""
    model, ties = config.model, gpt.ties(config.model)
    chunk = stage_chunk(model, groups)
    specs = {spec.name: spec for spec in gpt.specs(model)}
    with torch.device("meta"):
        stage = gpt.build(model, chunk, _functions(groups))
    shard(stage, specs, ties, groups.tensor)
    names = [ties.get(name, name) for name, _ in stage.named_parameters()]
    tied = frozenset(ties.values()) if groups.layout.pipe > 1 else frozenset()
    return StageEngine(
        stage,
        parameter_groups([specs[name] for name in names], config.optimizer, tied),
        ties,
        partial(adamw, config=config.optimizer),
        deepspeed_config(
            config.parallel,
            config.precision,
            config.optimizer,
            num_micro_batches(run_stage, config.parallel, groups.layout.data),
            sum(specs[name].local_numel(groups.tensor.size) for name in names),
        ),
        groups,
        device,
    )


def stage_chunk(model: ModelConfig, groups: Groups) -> Chunk:
    """The part of the model that this rank's pipeline stage holds."""
    layers = cut(model, groups.layout.pipe)[groups.coordinates.stage]
    return Chunk(layers, first=groups.is_first_stage, last=groups.is_last_stage)


def stage_boundary(model: ModelConfig, run_stage: RunStage, micro_batch_size: int, dtype: torch.dtype) -> Boundary:
    """What each stage hands to the next: hidden states, and the document numbers that attention needs."""
    rows = (micro_batch_size, run_stage.sequence_length)  # (B, T)
    boundary: Boundary = {"hidden_BTD": Field((*rows, model.hidden_size), dtype, differentiable=True)}
    if run_stage.data.attention == "document":
        boundary["segments_BT"] = Field(rows, torch.int32, differentiable=False)
    return boundary


def _functions(groups: Groups) -> Functions:
    if groups.tensor.size == 1:
        return PLAIN
    return Functions(cross_entropy=partial(vocabulary_cross_entropy, group=groups.tensor))
