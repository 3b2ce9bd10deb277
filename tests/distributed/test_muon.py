"""Muon under every ZeRO stage and tensor parallelism against one plain torch loop that holds every matrix whole.

The tolerances of `parity` hold for it, too: a layout's gradients differ by rounding, 1e-6 of their norm; the
iteration amplifies the smallest singular values by 3.4445 to the fifth, 485, so an update is off by 5e-4 of its scale,
0.2 x sqrt(32), times the learning rate 1e-2: 6e-6 a step, under 1e-4 in six.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from engine.checkpoint.fingerprint import fingerprint_of_checkpoint
from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint
from engine.train.metrics import read_metrics
from tests.distributed.cases import Case
from tests.distributed.parity import check
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

CASES: list[Any] = [Case(model="llama", optimizer="muon", zero_stage=zero_stage, data=2) for zero_stage in range(4)]
CASES += [
    Case(model="llama", optimizer="muon", zero_stage=3, tensor=2),
    Case(model="gpt2", optimizer="muon", zero_stage=1, pipe=2),
    pytest.param(Case(model="llama", optimizer="muon", zero_stage=2, tensor=2, data=2), marks=pytest.mark.matrix),
    pytest.param(Case(model="gpt2", optimizer="muon", zero_stage=1, pipe=2, data=2), marks=pytest.mark.matrix),
]


def test_its_momentum_is_in_the_checkpoint_and_goes_on_in_another_layout(tmp_path):
    write_corpus(tmp_path / "corpus")
    optimizer = {"name": "muon", "learning_rate": 1e-2}
    tree = run_tree(tmp_path / "corpus", tmp_path / "whole", optimizer=optimizer, parallel={"zero_stage": 2, "data": 2})
    run_ranks(2, train_rank, tree)
    saved = step_path(tmp_path / "whole" / "checkpoints", 3)
    manifest = open_checkpoint(saved)
    assert manifest.placements["layers.0.ffn.up_proj.weight"].moments == ("momentum_buffer",)
    assert manifest.placements["embed_tokens.weight"].moments == ("exp_avg", "exp_avg_sq")
    ignored = shutil.ignore_patterns("step-00000006", "step-00000009")
    shutil.copytree(tmp_path / "whole", tmp_path / "other", ignore=ignored)
    other = tree | {"folder": str(tmp_path / "other"), "parallel": {"zero_stage": 3, "tensor": 2}}
    ranks = run_ranks(2, train_rank, other)
    assert {rank["at_start"] for rank in ranks} == {fingerprint_of_checkpoint(saved, manifest)}
    losses = [
        {record["step"]: record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record}
        for name in ("whole", "other")
    ]
    # weights within 1e-4 (above), of some 16 inputs of size 1 each: a logit within 2e-3, a mean loss far within
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=2e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_equals_plain_torch(case: Case):
    check(case)
