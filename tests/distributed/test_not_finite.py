"""A gradient that is not a number, on one data rank of one stage: every rank refuses the step, no weight moves."""

from __future__ import annotations

import pytest
import torch

from engine.config.resolve import resolve
from engine.parallel.zero import NotFinite
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.ranks import run_ranks


def poisoned_step(place, case: Case) -> str:
    from engine.train.build import build_pipeline, join_groups

    config = config_of(case)
    groups = join_groups(config, resolve(config, place.world_size), place.global_rank)
    pipeline = build_pipeline(config, config.stages[0], groups, torch.device("cpu"))
    before = [piece.weight.clone() for piece in pipeline.engine.pieces()]
    batch = global_batch(0, case.attention)
    batch["weights_BT"][-1, 0] = torch.nan  # the last row: one data rank's, one stage's
    pipeline.train(stage_inputs(batch, case, groups), torch.tensor(1.0))
    with pytest.raises(NotFinite) as raised:
        pipeline.engine.step(LEARNING_RATE)
    assert all(torch.equal(held, piece.weight) for held, piece in zip(before, pipeline.engine.pieces(), strict=True))
    return raised.value.wrong


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_no_rank_takes_the_step(zero_stage):
    case = Case(zero_stage=zero_stage, pipe=2, data=2)
    assert run_ranks(4, poisoned_step, case) == ["the gradient norm is nan"] * 4
