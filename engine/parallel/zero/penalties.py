"""Quadratic penalties on the weights, added to the local shards of the gradient: no weight or gradient is gathered.

A penalty is strength / 2 x sum of importance x (weight - center)^2 over the trained parameters, and its gradient
strength x importance x (weight - center). Both need nothing but an element's own numbers, so every rank computes them
for the fp32 master weights that it holds. They are added after data ranks, tensor ranks and tied pipeline stages have
summed their gradients: each copy of an element then gets the same term, once, whatever the number of ranks. The norm
and the clipping that follow include it, as they would with a penalty that is part of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.parallel.state import ParameterShard


@dataclass(frozen=True)
class Penalty:
    """One penalty; `center` and `importance` name moments that were added to the engine."""

    name: str
    strength: float
    center: str
    importance: str | None = None
    """None means 1 for every element."""


def add_penalty(penalty: Penalty, shard: ParameterShard, gradient: torch.Tensor) -> torch.Tensor:
    """Add a penalty's gradient to a shard's, in place; return the penalty of these elements, a scalar in fp32.

    The gradient may be in another dtype and, with `offload: optimizer`, on another device than the weights.
    """
    distance = shard.weight - shard.moments[penalty.center]
    pull = penalty.strength * distance
    if penalty.importance is not None:
        pull *= shard.moments[penalty.importance]
    gradient.add_(pull.to(gradient.device, gradient.dtype))
    # pull x distance = strength x importance x distance^2
    return 0.5 * torch.dot(pull, distance)


@torch.no_grad()
def add_penalties(
    penalties: Sequence[Penalty], shards: Iterable[tuple[ParameterShard, torch.Tensor, bool]], device: torch.device
) -> torch.Tensor:
    """Add all penalties to the gradients of (shard, gradient, counted); return each one over the counted shards.

    A shard is counted on one of the ranks that hold a copy of it. Returns (penalties,) in fp64 on `device`, without
    waiting for it. Sums are in fp32 within a shard and in fp64 across shards, as those of the gradient norm.
    """
    values: list[list[torch.Tensor]] = [[] for _ in penalties]
    for shard, gradient, counted in shards:
        for penalty, found in zip(penalties, values, strict=True):
            value = add_penalty(penalty, shard, gradient)
            if counted:
                found.append(value)
    totals = torch.zeros(len(penalties), dtype=torch.float64, device=device)
    for number, found in enumerate(values):
        if found:
            totals[number] = torch.stack(found).double().sum()
    return totals
