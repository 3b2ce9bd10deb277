"""Worlds and neighbouring layouts against the rules themselves."""

import pytest

from engine.config.resolve import resolve
from engine.errors import ConfigError
from engine.plan.composition import example
from engine.plan.worlds import neighbours, valid_worlds, with_parallel


def test_valid_worlds_are_pipe_x_tensor_x_divisors_of_the_batch() -> None:
    run = example({"parallel": {"pipe": 2, "tensor": 2, "micro_batch_size": 2}})
    assert valid_worlds(run, 100) == [4 * data for data in (1, 2, 3, 4, 6, 12)]


def test_a_fixed_data_size_leaves_one_world() -> None:
    assert valid_worlds(example({"parallel": {"data": 3, "pipe": 2}}), 20) == [6]


def test_neighbours_say_what_starting_them_would_say() -> None:
    run = example({"precision": {"dtype": "bf16"}, "parallel": {"pipe": 2}})
    fitting, refused = neighbours(run, 8)
    assert {(layout.pipe, layout.tensor) for layout in fitting} == {
        (1, 1),
        (1, 2),
        (1, 4),
        (2, 2),
        (2, 4),
        (4, 1),
        (4, 2),
    }
    assert [refusal.layouts for refusal in refused] == [("ZeRO-0",), ("pipe 1 x tensor 8",), ("pipe 8 x tensor 1",)]
    for layout in fitting:
        assert resolve(with_parallel(run, pipe=layout.pipe, tensor=layout.tensor), 8) == layout
    with pytest.raises(ConfigError) as caught:
        resolve(with_parallel(run, pipe=8), 8)
    assert refused[-1].problem.wrong in caught.value.wrong
