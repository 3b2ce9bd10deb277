"""The loss of a task beside that of replayed text: each divided by the weight of its own targets in the whole step.

Both kinds of rows have one loss of the model's head. So the rows of replayed text are weighed such that one division by
the weight of the task's targets is right for both:

    (task + f x text) / W_task = task / W_task + loss_weight x text / W_text    with f = loss_weight x W_task / W_text

Legend: B rows of a micro-batch, L losses (one), K sources, of which the replayed text is the last.
"""

from __future__ import annotations

import torch

from engine.data.batch import WEIGHTS
from engine.parallel.boundary import DOMAINS, Tensors


def balanced(
    inputs: list[Tensors], weights_KL: torch.Tensor, loss_weight: float
) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
    """Return this rank's inputs with the weights of replayed text changed, the weight that the sum of all losses is to
    be divided by (L, fp64), and the weights of the sources' targets as they are now (K, L).

    `weights_KL` are those of the whole step, so that all ranks change their rows alike.
    """
    # one read, for each waits for the device: (2,)
    of_task, of_text = torch.stack([weights_KL[:-1].sum(), weights_KL[-1].sum()]).tolist()
    divisor = of_task or 1.0  # a step may have no target of the task
    factors_K = weights_KL.new_ones(len(weights_KL))
    factors_K[-1] = loss_weight * divisor / of_text if of_text else 0.0
    changed = [_weighed(one, factors_K) if DOMAINS in one else one for one in inputs]
    return changed, weights_KL.new_full((weights_KL.size(1),), divisor), weights_KL * factors_K[:, None]


def _weighed(given: Tensors, factors_K: torch.Tensor) -> Tensors:
    """Return the inputs of a micro-batch with each row's weights times the factor of its source."""
    factors_B = factors_K[given[DOMAINS]].float()
    # (B,) -> (B, 1) for weights of tokens
    times = {
        name: tensor * factors_B.reshape(-1, *[1] * (tensor.dim() - 1))
        for name, tensor in given.items()
        if WEIGHTS in name
    }
    return given | times
