"""The rank grid: positions of ranks on the axes pipe, data, sequence and tensor. Pure arithmetic.

The tensor axis is innermost, so its ranks are neighbours on a node where its traffic is heaviest; then sequence,
data and pipe (Narayanan et al. 2021, section 3). The grid is one numpy reshape of the world's ranks.

With 8 ranks, pipe 2, data 2 and tensor 2: rank 5 is on stage 1 with data rank 0 and tensor rank 1; its tensor group is
(4, 5), its data group (5, 7), its pipe group (1, 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.config.resolve import Layout

Axis = Literal["pipe", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = ("pipe", "data", "sequence", "tensor")
"""Axes of the grid, outermost first."""


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank on every axis. `stage` is the position on the pipe axis."""

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
        """Return the position of a rank on every axis."""
        stage, data_rank, sequence_rank, tensor_rank = np.unravel_index(global_rank, self.ranks.shape)
        return Coordinates(int(stage), int(data_rank), int(sequence_rank), int(tensor_rank))

    def global_rank(self, stage: int, data_rank: int, sequence_rank: int, tensor_rank: int) -> int:
        """Return the rank at a position."""
        return int(self.ranks[stage, data_rank, sequence_rank, tensor_rank])

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Return every set of ranks that differ on the given axes only, each ascending; they partition the world."""
        along = [AXES.index(axis) for axis in axes]
        rest = [dim for dim in range(len(AXES)) if dim not in along]
        # The given axes last, in grid order so that each row ascends: (others..., along...) -> (groups, ranks of one).
        size = int(np.prod([self.ranks.shape[dim] for dim in along]))
        rows = self.ranks.transpose(rest + sorted(along)).reshape(-1, size)
        return [[int(rank) for rank in row] for row in rows]
