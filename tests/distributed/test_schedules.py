"""Chunks, gathers and reductions against plain torch (the parity matrix has more), and an evaluation's number."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import Case, config_of, global_batch, stage_inputs
from tests.distributed.parity import check
from tests.distributed.plain import reference
from tests.distributed.ranks import run_ranks

matrix = pytest.mark.matrix
DEEP = "gpt2-deep"  # six layers: four parts of it are uneven


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(DEEP, zero_stage=3, pipe=2, data=2, chunks_per_stage=2), marks=matrix),
        Case(DEEP, zero_stage=1, pipe=3, chunks_per_stage=2),  # 8 micro-batches: a multiple of 3 and two more
    ],
    ids=str,
)
def test_chunks_equal_plain_torch(case: Case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(DEEP, zero_stage=3, pipe=2, data=2, chunks_per_stage=2, gather="step", reduce="step"),
        Case("llama", zero_stage=2, data=2, reduce="step"),
    ],
    ids=str,
)
def test_gathers_and_reductions_per_step_equal_plain_torch(case: Case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", zero_stage=3, pipe=2, data=2, schedule="zb-h1", reduce="step"),
        pytest.param(Case(zero_stage=0, pipe=2, tensor=2, schedule="zb-h1"), marks=matrix),
    ],
    ids=str,
)
def test_weight_gradients_put_off_equal_plain_torch(case: Case):
    check(case)


def evaluate(environment: Any, case: Case) -> float:
    """The first batch's summed loss under the initial weights, on the last stage; the same after a backward."""
    import torch

    from engine.config.resolve import resolve
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    inputs = stage_inputs(global_batch(0, case.attention), case, groups)
    before = pipeline.evaluate(inputs)
    pipeline.train(inputs, torch.tensor(0.0))
    assert torch.equal(pipeline.evaluate(inputs), before)
    return before.sum().item()


def test_evaluation_goes_through_every_chunk():
    case = Case(DEEP, zero_stage=3, pipe=2, chunks_per_stage=3)
    weight = global_batch(0, case.attention)["weights_BT"].sum().item()
    sums = run_ranks(2, evaluate, case)
    assert sums[0] == 0.0
    assert sums[1] / weight == pytest.approx(reference(case).losses[0], rel=0, abs=2e-6)
