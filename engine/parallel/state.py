"""Named shards of the model's state that an engine holds: the interface between ZeRO and checkpoints.

A checkpoint never asks which ZeRO stage, pipeline stage or tensor rank wrote it: it sees shards of named
parameters, and a placement per parameter from which the shard of any rank follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.parallel.sharding import ParameterSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, as torch names them."""
MOMENTUM = ("momentum_buffer",)
"""Muon's moment, as torch names it."""


ShardRange = tuple[ParameterSpec, int, int, int]
"""(parameter, first element of its flattened local part, offset in the optimizer's tensor, length); length 0 where this
rank holds nothing of it."""


@dataclass(frozen=True)
class ParameterShard:
    """A live flat range of this rank's tensor-parallel part of one parameter.

    `start` counts elements of the flattened (row-major) local part; `weight` is the fp32 master and each moment (the
    optimizer's, and those that were added to the engine) has the same length. A frozen parameter has no moments, and
    its weight is the working copy, in the working dtype. All are 1-D views: writing to them changes the engine.
    """

    spec: ParameterSpec
    start: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.weight.numel()


@dataclass(frozen=True)
class Placement:
    """Distribution of one parameter over the ranks: data rank d holds the elements
    [d * partition - offset, (d + 1) * partition - offset) of the flattened local part, cut to its length.

    With offset 4, partition 6 and 8 elements, data rank 0 holds elements 0 and 1, data rank 1 elements 2 to 7.

    ZeRO-0: offset 0, partition = the local length (so data rank 0 holds it all, and copies on other data ranks
    are not shards). ZeRO-3: offset 0, partition = the parameter's own. ZeRO-1 and 2: offset in the padded flat
    buffer of its parameter group. Frozen, under any ZeRO stage: offset 0, partition = an equal share. A replicated
    parameter is written by tensor rank 0 alone, a tied one by the first of its pipeline stages.
    """

    spec: ParameterSpec
    stages: tuple[int, ...]
    offset: int
    partition: int
    moments: tuple[str, ...] = MOMENTS
    """Names of the values kept beside the weight: the optimizer's moments, and those that were added."""

    def range_of(self, data_rank: int, local_numel: int) -> tuple[int, int]:
        """Return (start, length) of a data rank's shard; length 0 where it holds nothing."""
        start = max(data_rank * self.partition - self.offset, 0)
        end = min((data_rank + 1) * self.partition - self.offset, local_numel)
        return (start, max(end - start, 0)) if end > start else (0, 0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one stage that the optimizer and the gradient norm treat alike.

    Parameters that are whole on every tensor rank (`replicated`) never share a group with split ones, and weights
    that several pipeline stages hold (`tied`: those stages, ascending) have a group of their own on each of them, so
    that their optimizer state is cut alike there.
    """

    specs: tuple[ParameterSpec, ...]
    weight_decay: float
    replicated: bool
    tied: tuple[int, ...] = ()
    partial: bool = False
    """True if each tensor rank computes a part of their gradients: they are replicated, and a rank applies them to its
    slice of the sequence only."""
    matrices: bool = False
    """True if Muon updates them: weights of linear layers."""
    rate_factors: tuple[float, ...] = ()
    """Factor of the learning rate in each run stage; 1 in those that are not named."""
    trained_since: int | None = 0
    """Run stage at whose beginning the moments began at zero, but for a reset of all moments; None: frozen."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the values that the optimizer keeps of each parameter beside the weight."""
        if self.trained_since is None:
            return ()
        return MOMENTUM if self.matrices else MOMENTS
