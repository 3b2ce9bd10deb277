"""Weights that are kept as added moments of an engine: copied, exchanged with the master weights, computed with.

All of it works on the shards that a rank holds. Only the working weights that follow from the masters are communicated,
as after an update (`StageEngine.refresh`). Frozen parameters have no moments, and keep their weights throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from engine.parallel.state import ParameterShard


class Shards(Protocol):
    """The part of `StageEngine` that is used here."""

    def parameter_shards(self) -> list[ParameterShard]: ...

    def refresh(self, frozen: bool = True) -> None: ...


@torch.no_grad()
def copy_weights(engine: Shards, moment: str) -> None:
    """Set an added moment to the present weights. No save may be copying it."""
    for shard in _with(engine, moment):
        shard.moments[moment].copy_(shard.weight)


@torch.no_grad()
def average(engine: Shards, moment: str, decay: float) -> None:
    """Set an added moment to decay x itself + (1 - decay) x weights. No save may be copying it."""
    for shard in _with(engine, moment):
        shard.moments[moment].lerp_(shard.weight, 1.0 - decay)


@torch.no_grad()
def step_back(engine: Shards, moment: str, step_size: float) -> None:
    """Set weights and moment to moment + step_size x (weights - moment): the meta-step of Reptile.

    Collective over the ZeRO group, which the working weights are brought up to date in. No save may be copying either.
    """
    for shard in _with(engine, moment):
        shard.weight.copy_(shard.moments[moment].lerp_(shard.weight, step_size))
    engine.refresh(frozen=False)


@contextlib.contextmanager
def weights_from(engine: Shards, moment: str) -> Iterator[None]:
    """Let the engine compute with an added moment in place of its weights; these come back bit for bit.

    Meanwhile the moment holds the weights, so nothing may be saved. Collective over the ZeRO group.
    """
    _exchange(engine, moment)
    engine.refresh(frozen=False)
    try:
        yield
    finally:
        _exchange(engine, moment)
    # Not after an error, which may be one of this rank alone: the others would not come to this collective.
    engine.refresh(frozen=False)


@torch.no_grad()
def _exchange(engine: Shards, moment: str) -> None:
    for shard in _with(engine, moment):
        weight = shard.weight.clone()  # one shard of one parameter at a time
        shard.weight.copy_(shard.moments[moment])
        shard.moments[moment].copy_(weight)


def _with(engine: Shards, moment: str) -> list[ParameterShard]:
    return [shard for shard in engine.parameter_shards() if moment in shard.moments]
