"""Dropout of every layout against that of one process: the same keys, so the same masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.models.dropout import KEYS
from engine.models.families import family
from engine.models.initial import initial_value
from engine.models.materialize import fill
from tests.distributed.cases import Case, config_of, global_batch, stage_inputs
from tests.distributed.parity import check
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    "case",
    [
        Case("bert-dropout", zero_stage=3, pipe=2, tensor=2, recompute="full"),
        Case("bert-dropout", zero_stage=1, tensor=2, micro_batch_size=4, recompute="selective", sequence_parallel=True),
        Case("gpt2-dropout", zero_stage=2, pipe=2, data=2, attention="row"),
        pytest.param(
            Case("bert-dropout", zero_stage=3, pipe=2, tensor=2, data=2, recompute="full"), marks=pytest.mark.matrix
        ),
        pytest.param(Case("gpt2-dropout", zero_stage=2, pipe=3, data=2, attention="row"), marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_it_equals_that_of_one_process(case: Case):
    check(case)


def evaluated(environment: Any, case: Case) -> list[float]:
    """The first batch's summed losses under the initial weights, in evaluation, before and after a step's passes."""
    from engine.config.resolve import resolve
    from engine.train.build import build_pipeline, join_groups, stage_spec

    config = config_of(case)
    groups = join_groups(config, resolve(config, environment.world_size), environment.global_rank)
    pipeline = build_pipeline(config, stage_spec(config, config.stages[0], groups), groups, torch.device("cpu"))
    inputs = stage_inputs(global_batch(0, case.attention, case.model), case, groups)
    without = [{name: tensor for name, tensor in given.items() if name != KEYS} for given in inputs]
    before_L = pipeline.evaluate(without)
    pipeline.train(inputs, torch.zeros(2))
    assert torch.equal(pipeline.evaluate(without), before_L)
    return before_L.tolist()


def test_evaluation_has_none_on_any_stage():
    case = Case("bert-dropout", pipe=2)
    model = config_of(case).model
    specs = {spec.name: spec for spec in family(model).specs(model)}
    whole = family(model).build(model)
    fill(whole, lambda name: initial_value(specs[name], model, seed=3))
    batch = global_batch(0, case.attention, case.model)
    with torch.no_grad():
        dropped = whole(**batch)["losses_L"].tolist()
        expected = whole(**{name: tensor for name, tensor in batch.items() if name != KEYS})["losses_L"].tolist()
    assert expected != pytest.approx(dropped, rel=1e-4)
    assert run_ranks(2, evaluated, case)[1] == pytest.approx(expected, rel=1e-6)
