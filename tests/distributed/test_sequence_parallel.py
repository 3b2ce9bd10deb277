"""Sequence parallelism along the tensor axis against one plain torch process; tolerances as in `test_parity`."""

from __future__ import annotations

import pytest

from tests.distributed.cases import Case
from tests.distributed.test_parity import check

matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    "case",
    [
        Case("t5-dropout", zero_stage=3, pipe=2, tensor=2, sequence_parallel=True),
        pytest.param(Case("llama", zero_stage=3, pipe=2, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case("bert", zero_stage=1, pipe=2, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case("t5", zero_stage=1, pipe=3, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case("t5", zero_stage=2, tensor=4, attention="row", sequence_parallel=True), marks=matrix),
        pytest.param(
            Case("t5-v1.1", zero_stage=2, tensor=2, data=2, micro_batch_size=2, sequence_parallel=True), marks=matrix
        ),
        pytest.param(
            Case("t5-dropout", zero_stage=0, pipe=2, tensor=2, recompute="selective", sequence_parallel=True),
            marks=matrix,
        ),
        pytest.param(
            Case("t5-v1.1", zero_stage=3, tensor=2, recompute="full", gather="step", sequence_parallel=True),
            marks=matrix,
        ),
        pytest.param(
            Case("bert", zero_stage=3, tensor=2, data=2, recompute="full", sequence_parallel=True), marks=matrix
        ),
        pytest.param(Case("modernbert", zero_stage=2, pipe=2, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=0, tensor=2, attention="row", sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=1, tensor=4, sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=2, tensor=2, data=2, micro_batch_size=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=3, pipe=2, tensor=2, data=2, decay=False, sequence_parallel=True), marks=matrix),
        pytest.param(Case("llama-tied", zero_stage=1, pipe=2, tensor=2, sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=3, tensor=2, recompute="selective", sequence_parallel=True), marks=matrix),
        pytest.param(Case(zero_stage=1, tensor=2, recompute="full", sequence_parallel=True), marks=matrix),
    ],
    ids=str,
)
def test_layout_equals_plain_torch(case: Case) -> None:
    check(case)
