import pytest
import torch

from engine.train.step_totals import Sums


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 1024, 2**20])
def test_a_loss_without_targets_has_scale_0_on_any_number_of_ranks(num_ranks: int) -> None:
    """The trainer multiplies by the ranks of data x sequence, and gradients are fp32."""
    scales_L = (num_ranks * Sums.scales(torch.tensor([4.0, 0.0], dtype=torch.float64))).float()
    assert scales_L.tolist() == [num_ranks / 4, 0.0]
    assert (scales_L * torch.zeros(2)).tolist() == [0.0, 0.0]


def test_other_scales_are_reciprocals() -> None:
    weights_L = torch.tensor([1.0, 3.0, 1e9], dtype=torch.float64)
    assert torch.equal(Sums.scales(weights_L), 1.0 / weights_L)
