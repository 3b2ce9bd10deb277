"""Boxes of flat ranges and of tensor-parallel parts, held against brute-force arrays of indices."""

import math

import numpy as np
import pytest

from engine.checkpoint.geometry import Box, flat_boxes, flat_span, real_numel, to_local, to_whole
from engine.parallel.sharding import VOCABULARY, ParameterSpec
from tests.engine.checkpoint.worlds import elements, parts, random_spec


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)])
def test_every_flat_range_is_at_most_2k_minus_1_boxes_in_order(shape):
    index = np.arange(math.prod(shape)).reshape(shape)
    for start in range(index.size):
        for length in range(1, index.size - start + 1):
            boxes = flat_boxes(shape, start, length)
            assert len(boxes) <= 2 * len(shape) - 1
            found = np.concatenate([elements(index, box).ravel() for box in boxes])
            assert found.tolist() == list(range(start, start + length))


def test_an_empty_range_has_no_boxes():
    assert flat_boxes((3, 4), 5, 0) == []


def test_the_bound_is_reached():
    assert len(flat_boxes((4, 4, 4), 5, 54)) == 5


def test_local_boxes_map_to_the_whole_and_back():
    random = np.random.default_rng(5)
    for _ in range(500):
        tensor_size = int(random.choice([1, 2, 3, 4]))
        spec = random_spec(random, tensor_size)
        index = np.arange(math.prod(spec.shape)).reshape(spec.shape)
        for tensor_rank, part in enumerate(parts(spec, tensor_size)):
            start = int(random.integers(part.size))
            length = int(random.integers(1, part.size - start + 1))
            found = set()
            for box in flat_boxes(part.shape, start, length):
                for local, whole in to_whole(spec, box, tensor_rank, tensor_size):
                    assert np.array_equal(elements(part, local), elements(index, whole))
                    assert found.isdisjoint(elements(index, whole).ravel().tolist())
                    found.update(elements(index, whole).ravel().tolist())
                    assert (local, whole) in list(to_local(spec, whole, tensor_rank, tensor_size))
            assert found == set(part.ravel()[start : start + length].tolist())


def test_real_elements_are_a_prefix_of_each_part():
    for tensor_size in (1, 2, 4):
        for real_rows in range(1, 9):
            spec = ParameterSpec("p", (8, 3), VOCABULARY, real_rows)
            for tensor_rank, part in enumerate(parts(spec, tensor_size)):
                real = part.ravel() < real_rows * 3
                assert real_numel(spec, tensor_rank, tensor_size) == real.sum()
                assert real[: real.sum()].all()


def test_boxes_meet_clip_and_move():
    assert Box((0, 0), (2, 3)).meet(Box((1, 2), (4, 4))) == Box((1, 2), (1, 1))
    assert Box((0, 0), (2, 3)).meet(Box((2, 0), (1, 1))) is None
    assert Box((0, 0), (2, 3)).clip(1, 2, 9) == Box((0, 2), (2, 1))
    assert Box((0, 0), (2, 3)).clip(1, 3, 9) is None
    assert Box((0, 1), (2, 2)).move(0, 5).carry(Box((5, 0), (1, 1)), Box((0, 0), (1, 1))) == Box((0, 1), (2, 2))
    assert flat_span(Box((1, 1), (2, 2)), (4, 5)) == (6, 12)
