"""A gradient that is not a number, on one data rank of one stage: no rank takes the step, or all discard it whole."""

from __future__ import annotations

import pytest
import torch

from engine.config.resolve import resolve
from engine.parallel.zero import NotFinite
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.discarding import discarded_steps
from tests.distributed.ranks import run_ranks

matrix = pytest.mark.matrix


def poisoned_step(environment, case: Case) -> str:
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    before = [shard.weight.clone() for shard in pipeline.engine.parameter_shards()]
    batch = global_batch(0, case.attention)
    batch["weights_BT"][-1, 0] = torch.nan  # the last row: one data rank's, one stage's
    pipeline.train(stage_inputs(batch, case, groups), torch.tensor(1.0))
    with pytest.raises(NotFinite) as raised:
        pipeline.engine.step(LEARNING_RATE)
    assert all(
        torch.equal(held, shard.weight) for held, shard in zip(before, pipeline.engine.parameter_shards(), strict=True)
    )
    return raised.value.wrong


@pytest.mark.parametrize("zero_stage", [3, pytest.param(0, marks=matrix)])
def test_no_rank_takes_the_step(zero_stage):
    case = Case(zero_stage=zero_stage, pipe=2, data=2)
    assert run_ranks(4, poisoned_step, case) == ["the gradient norm is nan"] * 4


DISCARDING = [
    Case(zero_stage=0, data=2),
    Case(zero_stage=1, pipe=2, dtype="bf16"),
    Case(zero_stage=2, data=2),
    Case(zero_stage=3, data=2),
    pytest.param(Case(zero_stage=1, data=2), marks=matrix),
    pytest.param(Case(zero_stage=3, data=2, dtype="bf16"), marks=matrix),
]


@pytest.mark.parametrize("case", DISCARDING, ids=str)
def test_a_discarded_step_leaves_no_trace(case):
    run_ranks(2, discarded_steps, case)
