"""Some ranks keep a second copy of ZeRO-3's weights between them: the same numbers, also after weights are set anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.resolve import resolve
from tests.distributed.cases import LEARNING_RATE, Case, config_of, global_batch, stage_inputs
from tests.distributed.parity import check
from tests.distributed.ranks import run_ranks

PARITY = Case(zero_stage=3, sequence=2, data=2, gather_within=2)
OF_FOUR = Case("bert", zero_stage=3, data=8, gather_within=4, recompute="full")


def test_a_second_copy_equals_plain_torch() -> None:
    check(PARITY)


@pytest.mark.matrix
def test_a_copy_between_four_ranks_equals_plain_torch() -> None:
    check(OF_FOUR)


def steps_anew(environment: Any, case: Case) -> tuple[bool, list[int]]:
    """Whether a step repeats bit for bit after its weights and moments were set back, with a pass between that has
    copies made of the newer weights; and the ranks of this rank's copy."""
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    engine = pipeline.engine
    inputs = stage_inputs(global_batch(0, case.attention, case.model), case, groups)

    def state() -> list[torch.Tensor]:
        return [t for shard in engine.parameter_shards() for t in (shard.weight, *shard.moments.values())]

    def step() -> list[torch.Tensor]:
        pipeline.train(inputs, torch.tensor([0.1]))
        engine.step(LEARNING_RATE)
        return [t.clone() for t in state()]

    before = [t.clone() for t in state()]
    first = step()
    pipeline.evaluate(inputs)
    for held, value in zip(state(), before, strict=True):
        held.copy_(value)
    engine.refresh()
    engine.set_updates(0)
    same = all(map(torch.equal, first, step()))
    assert groups.near is not None
    return same, list(groups.near.ranks)


@pytest.mark.matrix
def test_copies_follow_weights_that_are_set_anew_and_lie_along_the_data_axis() -> None:
    found = run_ranks(8, steps_anew, Case(zero_stage=3, tensor=2, data=4, gather_within=2))
    assert [same for same, _ in found] == [True] * 8
    assert [ranks for _, ranks in found] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [5, 7], [4, 6], [5, 7]]
