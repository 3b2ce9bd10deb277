"""The rank grid: which rank stands where on the axes pipe, data, sequence and tensor. Pure arithmetic.

The tensor axis is innermost, so its ranks are neighbours on a node where its traffic is heaviest; then sequence,
data and pipe (Narayanan et al. 2021, section 3). The grid is one numpy reshape of the world's ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.config.resolve import Layout

Axis = Literal["pipe", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = ("pipe", "data", "sequence", "tensor")
"""Outermost first."""


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands. `stage` is the position on the pipe axis."""

    stage: int
    data_rank: int
    sequence_rank: int
    tensor_rank: int


class Grid:
    """The ranks of one world as an array with one dimension per axis."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        shape = tuple(getattr(layout, axis) for axis in AXES)
        self.ranks = np.arange(layout.world_size).reshape(shape)  # (pipe, data, sequence, tensor)

    def coordinates(self, global_rank: int) -> Coordinates:
        """Position of a rank on every axis."""
        stage, data_rank, sequence_rank, tensor_rank = np.unravel_index(global_rank, self.ranks.shape)
        return Coordinates(int(stage), int(data_rank), int(sequence_rank), int(tensor_rank))

    def global_rank(self, stage: int, data_rank: int, sequence_rank: int, tensor_rank: int) -> int:
        """The rank that stands at a position."""
        return int(self.ranks[stage, data_rank, sequence_rank, tensor_rank])

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Every set of ranks that differ on the given axes only, in ascending order; they partition the world."""
        along = [AXES.index(axis) for axis in axes]
        rest = [dim for dim in range(len(AXES)) if dim not in along]
        size = int(np.prod([self.ranks.shape[dim] for dim in along]))
        rows = self.ranks.transpose(rest + sorted(along)).reshape(-1, size)
        return [[int(rank) for rank in row] for row in rows]
