"""The gradient that hooks see is the whole batch's: its shards cover each parameter once and have the global norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.config.rank_environment import RankEnvironment
from engine.models.families import family
from tests.distributed.batches import weights
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.ranks import run_ranks

CASES = (
    Case(zero_stage=0, data=2),
    Case(zero_stage=1, data=2, tensor=2),
    Case("t5", zero_stage=2, pipe=2, reduce="step"),
    Case(zero_stage=3, data=2, pipe=2),
)


def one_step(environment: RankEnvironment, case: Case) -> tuple[float, list[tuple[str, np.ndarray, np.ndarray]]]:
    """The norm of one step, and the shards of its gradient as (name, elements' numbers, values)."""
    from engine.config.resolve import resolve
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    batch = global_batch(0, case.attention, case.model)
    pipeline.train(stage_inputs(batch, case, groups), groups.zero.size / weights(batch))
    found: list[tuple[str, np.ndarray, np.ndarray]] = []

    def accept(norm: float) -> bool:
        for spec, start, grad in pipeline.engine.gradient_shards():
            numbers = torch.arange(int(np.prod(spec.shape))).reshape(spec.shape)
            own = spec.part(numbers, groups.tensor.position, groups.tensor.size).flatten()
            found.append((spec.name, own[start : start + grad.numel()].numpy(), grad.float().numpy().copy()))
        return True

    norm = pipeline.engine.step(LEARNING_RATE, accept).gradient_norm
    shards = {(shard.spec.name, shard.start, shard.length) for shard in pipeline.engine.parameter_shards()}
    assert {(name, len(values)) for name, _, values in found} == {(name, length) for name, _, length in shards}
    return norm, found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_shards_cover_the_model_and_have_its_norm(case):
    ranks: list[Any] = run_ranks(case.world_size, one_step, case)
    whole = {
        spec.name: np.full(int(np.prod(spec.shape)), np.nan, np.float32)
        for spec in family(config_of(case).model).specs(config_of(case).model)
    }
    for _, shards in ranks:
        for name, numbers, values in shards:
            held = whole[name][numbers]
            assert (np.isnan(held) | (held == values)).all(), f"{name}: ranks differ"
            whole[name][numbers] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    norm = float(np.sqrt(sum(np.square(values, dtype=np.float64).sum() for values in whole.values())))
    # two sums of squares of the same fp32 numbers, one of them in fp32 by tensor: 1e-6 of itself
    assert ranks[0][0] == pytest.approx(norm, rel=1e-6)
