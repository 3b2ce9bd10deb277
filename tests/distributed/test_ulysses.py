"""Rows whose time the ranks of the sequence axis share, against one plain torch process; see `test_parity`.

Whole runs too: evaluation counts each held-out target once, and a checkpoint goes on in a layout without the axis.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.train.metrics import read_metrics
from tests.distributed.cases import Case
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus
from tests.distributed.test_parity import check

matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    "case",
    [
        Case("bert-dropout", zero_stage=3, sequence=2, data=2),
        Case("t5-dropout", zero_stage=2, pipe=2, sequence=2),
        pytest.param(Case(zero_stage=1, sequence=4, micro_batch_size=2), marks=matrix),
        pytest.param(Case("llama-deep", zero_stage=3, sequence=4, data=2, gather="step", reduce="step"), marks=matrix),
        pytest.param(Case("bert", zero_stage=0, sequence=4, attention="row"), marks=matrix),
        pytest.param(Case("t5", zero_stage=1, sequence=4, attention="row"), marks=matrix),
    ],
    ids=str,
)
def test_layout_equals_plain_torch(case: Case) -> None:
    check(case)


def test_a_run_evaluates_and_goes_on_as_on_one_rank(tmp_path: Path) -> None:
    """Losses of 9 steps and 3 evaluations; the second half of the shared run is on one rank, from its checkpoint.

    fp32 sums of some hundred losses near 6 in another order, and 9 steps of Adam: within 1e-4.
    """
    write_corpus(tmp_path / "corpus")
    stages = run_tree(tmp_path / "corpus", tmp_path / "plain")["stages"]
    half = [stages[0] | {"duration": {"steps": 6}, "schedule": {"warmup": 2, "shape": "constant"}}]
    whole = [half[0] | {"duration": {"steps": 9}}]
    plain = run_tree(tmp_path / "corpus", tmp_path / "plain", stages=whole)
    run_ranks(1, train_rank, plain)
    shared = {"sequence": 2, "zero_stage": 3, "micro_batch_size": 2}
    run_ranks(2, train_rank, run_tree(tmp_path / "corpus", tmp_path / "shared", stages=half, parallel=shared))
    run_ranks(1, train_rank, run_tree(tmp_path / "corpus", tmp_path / "shared", stages=whole))
    expected, found = (read_metrics(tmp_path / name) for name in ("plain", "shared"))
    for key in ("loss", "gradient_norm", "validation_loss"):
        values = {record["step"]: record[key] for record in expected if key in record}
        same = {record["step"]: record[key] for record in found if key in record}
        assert same == pytest.approx(values, rel=1e-4), key
        assert len(values) == (3 if key == "validation_loss" else 9)
