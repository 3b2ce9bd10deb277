"""Layers that recompute train as layers that keep everything, bit for bit, in every kind of layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.distributed.cases import Case, Result, join_results, run_rank
from tests.distributed.ranks import run_ranks

matrix = pytest.mark.matrix


def run(case: Case) -> Result:
    return join_results(case, run_ranks(case.world_size, run_rank, case))


@pytest.mark.parametrize(
    "case",
    [
        Case(zero_stage=3, pipe=2, recompute="selective"),
        Case("llama", zero_stage=1, tensor=2, recompute="full", recompute_layers=2),
        pytest.param(Case(zero_stage=0, pipe=2, data=2, recompute="selective"), marks=matrix),
        pytest.param(Case("llama", zero_stage=2, data=2, recompute="selective"), marks=matrix),
        pytest.param(Case(zero_stage=3, data=2, dtype="bf16", recompute="full"), marks=matrix),
        pytest.param(Case("llama", zero_stage=3, pipe=2, schedule="gpipe", recompute="full"), marks=matrix),
        pytest.param(Case(zero_stage=3, pipe=2, tensor=2, data=2, recompute="full", recompute_layers=1), marks=matrix),
        pytest.param(Case(zero_stage=1, tensor=2, optimizer="muon", recompute="full"), marks=matrix),
    ],
    ids=str,
)
def test_recomputation_changes_no_bit(case: Case) -> None:
    plain, again = run(dataclasses.replace(case, recompute="none", recompute_layers=None)), run(case)
    assert again.losses == plain.losses
    assert again.norms == plain.norms
    for name, values in plain.weights.items():
        np.testing.assert_array_equal(again.weights[name], values)
