"""Rows whose time the ranks of the sequence axis share, against one plain torch process; see `parity.py`.

Whole runs too: evaluation counts each held-out target once, and a checkpoint goes on in a layout without the axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.train.metrics import read_metrics
from tests.distributed.cases import GPT2, T5, Case
from tests.distributed.parity import check
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

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


T5_RUN = {key: value for key, value in T5.items() if key not in GPT2} | {"vocab_size": 400, "num_decoder_layers": 2}
T5_RUN |= {"dropout": 0.1, "attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("model", "objective"),
    [({}, "causal"), pytest.param(T5_RUN, "span_corruption", marks=matrix)],
    ids=["gpt2", "t5"],
)
def test_a_run_evaluates_and_goes_on_as_on_one_rank(tmp_path: Path, model: dict[str, Any], objective: Any) -> None:
    """Losses of 9 steps and 3 evaluations; the second half of the shared run is on one rank, from its checkpoint.

    fp32 sums of some hundred losses near 6 in another order, and 9 steps of Adam: within 1e-4. T5's decoder has rows of
    5 tokens, which two ranks share as 6.
    """
    write_corpus(tmp_path / "corpus", objective)
    stages = run_tree(tmp_path / "corpus", tmp_path / "plain")["stages"]
    constant = {"schedule": {"warmup": 2, "shape": "constant"}, "objective": objective}
    half = [stages[0] | {"duration": {"steps": 6}} | constant]
    whole = [half[0] | {"duration": {"steps": 9}}]
    plain = run_tree(tmp_path / "corpus", tmp_path / "plain", stages=whole, model=model)
    run_ranks(1, train_rank, plain)
    shared = {"sequence": 2, "zero_stage": 3, "micro_batch_size": 2}
    begun = run_tree(tmp_path / "corpus", tmp_path / "shared", stages=half, parallel=shared, model=model)
    run_ranks(2, train_rank, begun)
    run_ranks(1, train_rank, run_tree(tmp_path / "corpus", tmp_path / "shared", stages=whole, model=model))
    expected, found = (read_metrics(tmp_path / name) for name in ("plain", "shared"))
    for key in ("loss", "gradient_norm", "validation_loss"):
        values = {record["step"]: record[key] for record in expected if key in record}
        same = {record["step"]: record[key] for record in found if key in record}
        assert same == pytest.approx(values, rel=1e-4), key
        assert len(values) == (3 if key == "validation_loss" else 9)
