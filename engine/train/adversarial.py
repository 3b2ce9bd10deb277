"""Adversarial training on the embeddings (Miyato et al. 2017): two passes per step, the second at the worst ones.

The first pass adds zeros to the embeddings of its tokens, whose gradient is that of the embeddings. A row's step away
is epsilon x that gradient / its norm over all tokens of the row; the second pass adds it. Gradients of both passes add
up, and the losses that a step reports are those of the first.

Legend: B batch, T tokens that this rank holds, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config.schema.run import RunConfig
from engine.models.embedding_shift import SHIFT
from engine.parallel.boundary import Tensors
from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Group, Groups
from engine.parallel.pipeline import DomainSums, Pipeline

LEAST_NORM = 1e-30
"""Norm that a row without a gradient, a padding row for one, is divided by."""


def train_adversarially(
    pipeline: Pipeline,
    groups: Groups,
    config: RunConfig,
    inputs: list[Tensors],
    scales_L: torch.Tensor,
    by_domain: DomainSums | None,
    epsilon: float,
) -> torch.Tensor:
    """Run both passes of a step; return the summed losses of the first, as `Pipeline.train` does.

    Collective over the world.
    """
    is_first = any(SHIFT in ports.inputs for ports in pipeline.spec.ports)
    zeros = [_zeros(pipeline, config, one) for one in inputs] if is_first else []
    sums_L = pipeline.train(_with(inputs, zeros), scales_L, by_domain, goes_on=True)
    # Ranks of these groups hold parts of the same rows.
    sharing = (groups.tensor,) if config.parallel.sequence_parallel else ()
    shifts = [_worst(zero, (*sharing, groups.sequence), epsilon) for zero in zeros]
    pipeline.train(_with(inputs, shifts), scales_L)
    return sums_L


def _with(inputs: list[Tensors], shifts: list[torch.Tensor]) -> list[Tensors]:
    return [one | {SHIFT: shift} for one, shift in zip(inputs, shifts, strict=True)] if shifts else inputs


def _zeros(pipeline: Pipeline, config: RunConfig, inputs: Tensors) -> torch.Tensor:
    """Return zeros of the shape of the embeddings of a micro-batch on this rank, a leaf of the graph."""
    num_rows, num_tokens = inputs["tokens_BT"].shape
    # Sequence parallelism looks up whole rows and keeps a slice; the sequence axis has cut the tokens already.
    shape = (num_rows, num_tokens // config.parallel.shared_by, config.model.hidden_size)
    return torch.zeros(shape, dtype=pipeline.engine.dtype, device=pipeline.engine.device, requires_grad=True)


@torch.no_grad()
def _worst(zeros_BTD: torch.Tensor, sharing: Sequence[Group], epsilon: float) -> torch.Tensor:
    """Return the step away from the embeddings. Collective over the groups `sharing` the rows."""
    grad_BTD = zeros_BTD.grad
    assert grad_BTD is not None, "the rule of regularization.adversarial lets gradients reach the embeddings"
    # Rows are divided by their own norms, so the scale of the losses does not matter.
    squares_B = grad_BTD.double().square().sum((1, 2))
    for group in sharing:
        squares_B = all_reduce(squares_B, group)
    scale_B = epsilon / squares_B.sqrt().clamp(min=LEAST_NORM)
    return (grad_BTD.double() * scale_B.view(-1, 1, 1)).to(grad_BTD.dtype)
