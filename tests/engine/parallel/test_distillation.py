"""Distillation in the losses over the vocabulary and over labels against whole logits in fp64: value, divergence,
gradients, order.

Tensor ranks, whose parts of the vocabulary join, are in tests/distributed/test_regularization.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.parallel.cross_entropy import linear_cross_entropy
from engine.parallel.distillation import DistilledCrossEntropy, DistilledLabels
from engine.parallel.groups import ALONE
from engine.plan import logits
from tests.engine.parallel.whole_logits import PADDED, REAL, inputs, with_logits

TOP_K, STRENGTH = 5, 0.7


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several chunks, the last of them smaller."""
    monkeypatch.setattr(logits, "ROW_MULTIPLE", 32)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 32 * PADDED)


def divergence(student: Any, teacher: Any, weights_BT: torch.Tensor) -> torch.Tensor:
    """The weighted sum of KL(likeliest of the teacher, of sum 1 || softmax of the student)."""
    logits_NV, taught_NV = (F.linear(*given)[..., :REAL].flatten(0, 1) for given in (student, teacher))
    best_NK, tokens_NK = taught_NV.topk(TOP_K, dim=-1)
    logs_NK = logits_NV.log_softmax(-1).gather(1, tokens_NK)
    return (F.kl_div(logs_NK, best_NK.softmax(-1), reduction="none").sum(-1) * weights_BT.flatten()).sum()


def distilled(top_k: int) -> DistilledCrossEntropy:
    loss = DistilledCrossEntropy(linear_cross_entropy, ALONE)
    loss.top_k = top_k
    return loss


def of(function: Any, given: Sequence[torch.Tensor], targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the loss of (hidden states, weight, bias)."""
    hidden, weight, bias = given
    return function(hidden, weight, bias, targets, weights, REAL)


def teacher_of(student: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [given.detach() + torch.randn(given.shape, generator=generator, dtype=given.dtype) for given in student]


def test_value_is_the_cross_entropy_and_gradient_that_of_the_sum_with_the_divergence():
    *student, targets_BT, weights_BT = inputs(torch.float64)
    weights_BT = weights_BT.double()
    teacher = teacher_of(student)
    loss = distilled(TOP_K)
    with torch.no_grad(), loss.teaching(STRENGTH):
        assert of(loss, teacher, targets_BT, weights_BT) == 0
    found = of(loss, student, targets_BT, weights_BT)
    plain, extra = of(with_logits, student, targets_BT, weights_BT), divergence(student, teacher, weights_BT)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain + STRENGTH * extra, student)
    torch.testing.assert_close(torch.autograd.grad(found, student), expected, rtol=1e-10, atol=1e-12)
    # sum of a step, in fp32
    torch.testing.assert_close(loss.take_divergence(), extra.detach(), rtol=1e-5, atol=0)
    assert loss.take_divergence() == 0, "of what came since"


def test_targets_meet_their_micro_batches_again_in_order_and_are_then_used_up():
    *student, targets_BT, weights_BT = inputs(torch.float64)
    weights_BT = weights_BT.double()
    loss = distilled(TOP_K)
    halves = [slice(0, 2), slice(2, None)]

    def parts(given: Sequence[torch.Tensor], rows: slice) -> list[torch.Tensor]:
        return [given[0][rows], *given[1:]]

    teacher = teacher_of(student)
    with torch.no_grad(), loss.teaching(STRENGTH):
        for rows in halves:
            of(loss, parts(teacher, rows), targets_BT[rows], weights_BT[rows])
    for rows in halves:
        of(loss, parts(student, rows), targets_BT[rows], weights_BT[rows])
    assert loss.take_divergence().item() == pytest.approx(divergence(student, teacher, weights_BT).item(), rel=1e-5)
    afterwards = of(loss, student, targets_BT, weights_BT)
    assert torch.equal(afterwards, of(linear_cross_entropy, student, targets_BT, weights_BT))
    assert loss.take_divergence() == 0


def test_a_teacher_that_predicts_alike_over_the_whole_vocabulary_changes_nothing():
    *student, targets_BT, weights_BT = inputs(torch.float64)
    loss = distilled(REAL)
    with torch.no_grad(), loss.teaching(STRENGTH):
        of(loss, student, targets_BT, weights_BT)
    found = torch.autograd.grad(of(loss, student, targets_BT, weights_BT), student)
    expected = torch.autograd.grad(of(linear_cross_entropy, student, targets_BT, weights_BT), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert abs(loss.take_divergence().item()) < 1e-4  # in fp32, of 200 terms


@pytest.mark.parametrize("lengths", [(4, 4, 4), (4, 1, 3)])
def test_labels_are_distilled_from_all_that_are_no_padding(lengths):
    """Rows of so many labels; torch's divergence of each row by itself sees no padding."""
    generator = torch.Generator().manual_seed(2)
    student_BC, teacher_BC = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    student_BC.requires_grad_()
    labels_B, weights_B = torch.tensor([3, 0, 1]), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    padding_BC = torch.arange(4) >= torch.tensor(lengths)[:, None] if min(lengths) < 4 else None
    smoothing_B = torch.full((3,), 0.2, dtype=torch.float64)
    loss = DistilledLabels()
    with torch.no_grad(), loss.teaching(STRENGTH):
        loss(teacher_BC, labels_B, weights_B, smoothing_B, padding_BC)
    found_B = loss(student_BC, labels_B, weights_B, smoothing_B, padding_BC)
    rows = [(student_BC[b, :n], teacher_BC[b, :n]) for b, n in enumerate(lengths)]
    plain_B = weights_B * torch.stack(
        [F.cross_entropy(row, labels_B[b], label_smoothing=0.2) for b, (row, _) in enumerate(rows)]
    )
    extra_B = weights_B * torch.stack(
        [F.kl_div(row.log_softmax(0), taught.softmax(0), reduction="sum") for row, taught in rows]
    )
    torch.testing.assert_close(found_B, plain_B, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(found_B.sum(), student_BC)
    (expected,) = torch.autograd.grad((plain_B + STRENGTH * extra_B).sum(), student_BC)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.take_divergence(), extra_B.sum().detach(), rtol=1e-6, atol=0)
    afterwards_B = loss(student_BC, labels_B, weights_B, smoothing_B, padding_BC)
    assert torch.equal(afterwards_B, found_B), "targets are used up"
    assert loss.take_divergence() == 0
