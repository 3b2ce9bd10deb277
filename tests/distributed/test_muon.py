"""Muon under every ZeRO stage and tensor parallelism against one plain torch loop that holds every matrix whole.

Tolerance: a layout's gradients differ by rounding, 1e-6 of their norm; the iteration amplifies the smallest singular
values by 3.4445 to the fifth, 485, so an update is off by 5e-4 of its scale, 0.2 x sqrt(32), times the learning rate
1e-2: 6e-6 a step, under 1e-4 in six.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from engine.checkpoint.fingerprint import fingerprint_of_checkpoint
from engine.checkpoint.folder import step_path
from engine.checkpoint.load import open_checkpoint
from engine.models import gpt
from engine.models.initial import initial_value
from engine.models.values import fill
from engine.optim.groups import weight_decay
from engine.train.metrics import read_metrics
from tests.distributed.cases import (
    CLIP_NORM,
    EPSILON,
    LEARNING_RATE,
    NUM_STEPS,
    Case,
    config_of,
    global_batch,
    join_results,
    run_rank,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus
from tests.distributed.test_parity import KEY_BIAS_BOUND, key_biases

CASES = [Case(model="llama", optimizer="muon", zero_stage=zero_stage, data=2) for zero_stage in range(4)]
CASES += [
    Case(model="llama", optimizer="muon", zero_stage=3, tensor=2),
    Case(model="llama", optimizer="muon", zero_stage=2, tensor=2, data=2),
    Case(model="gpt2", optimizer="muon", zero_stage=1, pipe=2, data=2),
]


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """As the authors write it: wide matrices, five steps, their coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    if matrix.size(0) > matrix.size(1):
        x = x.T
    for _ in range(5):
        a = x @ x.T
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def reference(case: Case) -> dict[str, np.ndarray]:
    """Final weights of one plain torch loop: Muon for the layers' matrices, torch's AdamW for the rest."""
    config = config_of(case)
    model = gpt.build(config.model)
    specs, ties = {spec.name: spec for spec in gpt.specs(config.model)}, gpt.ties(config.model)
    fill(model, lambda name: initial_value(specs[ties.get(name, name)], config.model, config.seed))
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("layers.") and p.dim() == 2}
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    rest = [
        {"params": [p], "weight_decay": weight_decay(name, config.optimizer)}
        for name, p in named.items()
        if name not in matrices
    ]
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON, fused=False, foreach=False)
    for step in range(NUM_STEPS):
        batch = global_batch(step, case.attention)
        (model(**batch)["losses_L"].sum() / batch["weights_BT"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        adamw.step()
        for name, p in matrices.items():
            assert p.grad is not None
            momenta[name] = 0.95 * momenta[name] + p.grad
            sizes = next((cut for part, cut in blocks(case).items() if part in name), p.shape[0])
            parts = (p.grad + 0.95 * momenta[name]).split(sizes)
            update = torch.cat([newton_schulz(part) * 0.2 * max(part.shape) ** 0.5 for part in parts])
            with torch.no_grad():
                p.mul_(1 - LEARNING_RATE * 0.1).sub_(LEARNING_RATE * update)
        model.zero_grad()
    return {name: p.detach().numpy().copy() for name, p in named.items()}


def blocks(case: Case) -> dict[str, tuple[int, ...]]:
    """Rows of the projections that a fused matrix holds (16 wide, 4 heads, 2 key and value heads in Llama's form)."""
    return {"qkv_proj": (16, 8, 8), "gate_up_proj": (32, 32)} if case.model == "llama" else {"qkv_proj": (16, 16, 16)}


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
def test_layout_equals_plain_torch(case):
    expected = reference(case)
    found = join_results(case, run_ranks(case.world_size, run_rank, case))
    for name, values in expected.items():
        keys = key_biases(name, case)
        difference = np.abs(found.weights[name] - values)
        assert difference[~keys].max(initial=0) <= 1e-4, name
        assert difference[keys].max(initial=0) <= KEY_BIAS_BOUND, name
