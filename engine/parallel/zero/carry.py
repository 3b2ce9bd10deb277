"""Carrying of weights and moments by name from one engine of a pipeline stage to the next, which trains others.

The state waits in host memory while there is no engine. ZeRO-1 and 2 cut a flat buffer of each group, so that a range
of a parameter may move to another data rank; one parameter at a time is completed and cut anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Group, Groups
from engine.parallel.state import ParameterShard, Placement
from engine.parallel.zero.engine import StageEngine

WEIGHT = ""
"""Key of the weight beside those of the moments."""


class Carried:
    """State of an engine's parameters: a copy, on the host."""

    def __init__(self, engine: StageEngine) -> None:
        self.groups: Groups = engine.groups
        self._placements = {placement.spec.name: placement for placement in engine.placements()}
        self._held = {shard.spec.name: _copies(shard) for shard in engine.parameter_shards()}

    def put_into(self, engine: StageEngine) -> None:
        """Fill an engine that holds the same parameters: weights, and moments that both have.

        Moments that only the new engine has stay zero. Collective over the ZeRO group.
        """
        live = {shard.spec.name: shard for shard in engine.parameter_shards()}
        # by name: every rank of the group has these placements, in whatever order, also of what it holds nothing of
        for placement in sorted(engine.placements(), key=lambda placement: placement.spec.name):
            name = placement.spec.name
            before = self._placements[name]
            for state in (WEIGHT, *(moment for moment in before.moments if moment in placement.moments)):
                own = self._held[name][state] if name in self._held else None
                numel = placement.spec.local_numel(self.groups.tensor.size)
                values = _moved(own, before, placement, numel, self.groups.zero, engine.device)
                if name in live:
                    target = live[name]
                    held = target.weight if state == WEIGHT else target.moments[state]
                    held.copy_(values[target.start :][: target.length] if values.numel() == numel else values)
        engine.refresh()


def _copies(shard: ParameterShard) -> dict[str, torch.Tensor]:
    states: Iterator[tuple[str, torch.Tensor]] = iter([(WEIGHT, shard.weight), *shard.moments.items()])
    return {name: values.detach().to("cpu", torch.float32, copy=True) for name, values in states}


def _moved(
    own: torch.Tensor | None, before: Placement, after: Placement, numel: int, zero: Group, device: Any
) -> torch.Tensor:
    """Return this rank's range where it stays, else all of the local part (fp32, `numel`). Collective over `zero`."""
    same = (before.offset, before.partition) == (after.offset, after.partition)
    if same:
        return torch.empty(0) if own is None else own
    whole = torch.zeros(numel, dtype=torch.float32, device=device)
    start, length = before.range_of(zero.position, numel)
    if length:
        assert own is not None
        # under ZeRO-0 each rank has a copy of all; the first one's counts
        whole[start : start + length].copy_(own[:length])
    # as integers, so that every bit survives the sum with zeros, the sign of -0.0, too
    all_reduce(whole.view(torch.int32), zero)
    return whole
