import itertools

import pytest

from engine.config.resolve import Layout
from engine.parallel.axes import AXES, Grid

LAYOUTS = [Layout(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_rank_are_inverse(layout):
    grid = Grid(layout)
    for global_rank in range(layout.world_size):
        at = grid.coordinates(global_rank)
        assert grid.global_rank(at.stage, at.data_rank, at.sequence_rank, at.tensor_rank) == global_rank


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_partition_the_world_by_brute_force(layout):
    grid = Grid(layout)

    def position(global_rank: int) -> dict[str, int]:
        at = grid.coordinates(global_rank)
        return dict(zip(AXES, (at.stage, at.data_rank, at.sequence_rank, at.tensor_rank), strict=True))

    for count in range(1, len(AXES) + 1):
        for axes in itertools.combinations(AXES, count):
            expected: dict[tuple[int, ...], list[int]] = {}
            for global_rank in range(layout.world_size):
                key = tuple(value for axis, value in position(global_rank).items() if axis not in axes)
                expected.setdefault(key, []).append(global_rank)
            assert sorted(grid.groups(*axes)) == sorted(expected.values())


def test_tensor_ranks_are_neighbours_and_stages_far_apart():
    grid = Grid(Layout(pipe=2, data=2, sequence=1, tensor=2))
    assert grid.groups("tensor")[0] == [0, 1]
    assert grid.groups("data")[0] == [0, 2]
    assert grid.groups("pipe")[0] == [0, 4]
