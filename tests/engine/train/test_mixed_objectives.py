"""Weights of rows such that one division is right for a task's targets and for those of replayed text."""

import pytest
import torch

from engine.parallel.boundary import DOMAINS
from engine.train.mixed_objectives import balanced

TASK, TEXT = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0])
"""Losses of targets."""


def rows():
    """Two micro-batches: one row of the task and one of text, then one of text."""
    weights = [torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])]
    text = [torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    domains = [torch.tensor([0, 1]), torch.tensor([1])]
    return [
        {"label_weights_BT": own, "replay_weights_BM": other, DOMAINS: numbers, "tokens_BT": torch.ones(1)}
        for own, other, numbers in zip(weights, text, domains, strict=True)
    ]


@pytest.mark.parametrize("loss_weight", [1.0, 0.25])
def test_each_kind_is_divided_by_its_own_targets(loss_weight):
    weights_KL = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    inputs, (divisor,), changed_KL = balanced(rows(), weights_KL, loss_weight)
    task = (inputs[0]["label_weights_BT"][0, :2] * TASK).sum()
    text = (torch.cat([inputs[0]["replay_weights_BM"][1], inputs[1]["replay_weights_BM"][0, :1]]) * TEXT).sum()
    assert ((task + text) / divisor).item() == pytest.approx(TASK.mean().item() + loss_weight * TEXT.mean().item())
    # the loss of each source by its own weights is a plain mean
    assert (text / changed_KL[1, 0]).item() == pytest.approx(TEXT.mean().item())
    assert torch.equal(inputs[0]["label_weights_BT"], rows()[0]["label_weights_BT"])
    assert inputs[0]["tokens_BT"].dtype == torch.float32
    assert inputs[0]["replay_weights_BM"].dtype == torch.float32


def test_a_step_may_have_targets_of_one_kind_alone():
    _, (divisor,), changed_KL = balanced(rows(), torch.tensor([[2.0], [0.0]], dtype=torch.float64), 1.0)
    assert (divisor.item(), changed_KL[1, 0].item()) == (2.0, 0.0)
    inputs, (divisor,), _ = balanced(rows(), torch.tensor([[0.0], [3.0]], dtype=torch.float64), 0.5)
    assert divisor.item() == 1.0
    assert inputs[1]["replay_weights_BM"][0, 0].item() == pytest.approx(0.5 / 3)


def test_a_stage_without_a_head_changes_nothing():
    given = [{"hidden_BTD": torch.ones(1)}]
    assert balanced(given, torch.tensor([[2.0], [3.0]], dtype=torch.float64), 1.0)[0] == given


def test_the_weights_are_read_once(monkeypatch):
    """Each read waits for the device, in every step."""
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or plain(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a read of its own"))
    _, divisor_L, _ = balanced(rows(), torch.tensor([[2.0], [1.0], [3.0]], dtype=torch.float64), 1.0)
    assert reads == [(2,)]
    assert torch.equal(divisor_L, torch.tensor([3.0], dtype=torch.float64))
