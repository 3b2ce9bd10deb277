"""Boxes: a flat range of a tensor-parallel part as boxes of the whole parameter. Pure integers, no tensor.

A flat range of a row-major k-dimensional tensor is at most 2k-1 axis-aligned boxes, and a box of a local part is
one box of the whole parameter per sub-block it touches. Invariant: the boxes of a range are disjoint and hold each
of its elements exactly once. What lies in a file, and who wrote it, is `engine.checkpoint.writers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from engine.parallel.sharding import ParameterSpec, Shape


@dataclass(frozen=True)
class Box:
    """Elements whose index is in [start, start + size) along every dimension; never empty."""

    start: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def meet(self, other: Box) -> Box | None:
        """Return the intersection of two boxes, or None if they are disjoint."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        # the smaller end minus the larger start, along each dimension; not positive where they are disjoint
        size = tuple(min(a + m, b + n) - low for low, (a, m, b, n) in zip(start, ends, strict=True))
        return Box(start, size) if min(size) > 0 else None

    def clip(self, dim: int, start: int, length: int) -> Box | None:
        """Return the part of the box within [start, start + length) along `dim`, or None."""
        low = max(self.start[dim], start)
        high = min(self.start[dim] + self.size[dim], start + length)
        return Box(_put(self.start, dim, low), _put(self.size, dim, high - low)) if high > low else None

    def move(self, dim: int, by: int) -> Box:
        """Return the box shifted along `dim` by `by` elements."""
        return Box(_put(self.start, dim, self.start[dim] + by), self.size)

    def carry(self, before: Box, after: Box) -> Box:
        """Return the box shifted as `before` has to be to become `after`."""
        steps = zip(self.start, before.start, after.start, strict=True)
        return Box(tuple(here + b - a for here, a, b in steps), self.size)


def dims(shape: Shape) -> Shape:
    """Return `shape`, with a scalar seen as one row of one element."""
    return shape or (1,)


def strides(shape: Shape) -> Shape:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def flat_index(index: Shape, shape: Shape) -> int:
    """Position of an element in the flattened tensor."""
    return sum(i * stride for i, stride in zip(index, strides(shape), strict=True))


def flat_span(box: Box, shape: Shape) -> tuple[int, int]:
    """Flat positions of a box's first and last element."""
    last = tuple(start + size - 1 for start, size in zip(box.start, box.size, strict=True))
    return flat_index(box.start, shape), flat_index(last, shape)


def flat_boxes(shape: Shape, start: int, length: int) -> list[Box]:
    """Return the flat range [start, start + length) as at most 2k-1 boxes, in ascending order of their elements."""
    if length <= 0:
        return []
    # Shape (3, 4), range [2, 11): the end of row 0, row 1 whole, the beginning of row 2, as (start, size) the boxes
    # ((0, 2), (1, 2)), ((1, 0), (1, 4)) and ((2, 0), (1, 3)) of 2 + 4 + 3 elements.
    stop = start + length
    if len(shape) == 1:
        return [Box((start,), (length,))]
    row_numel = math.prod(shape[1:])
    first_row, head = divmod(start, row_numel)
    last_row, tail = divmod(stop, row_numel)
    if first_row == last_row:
        return _in_row(first_row, flat_boxes(shape[1:], head, length))
    boxes: list[Box] = []
    if head:
        boxes += _in_row(first_row, flat_boxes(shape[1:], head, row_numel - head))
        first_row += 1
    if last_row > first_row:
        boxes.append(Box((first_row, *(0,) * (len(shape) - 1)), (last_row - first_row, *shape[1:])))
    # tail 0: no box, since `flat_boxes` of length 0 is empty
    return boxes + _in_row(last_row, flat_boxes(shape[1:], 0, tail))


def to_whole(spec: ParameterSpec, box: Box, tensor_rank: int, tensor_size: int) -> Iterator[tuple[Box, Box]]:
    """Yield pairs (box in the local part, box in the whole parameter) that together make up `box` of the local part."""
    dim = spec.sharding.dim
    if dim is None or tensor_size == 1:
        yield box, box
        return
    # Blocks (4, 2, 2) of a fused q, k, v on rank 1 of 2: local rows 0 to 3 are rows 2, 3, 5 and 7 of the whole, so a
    # box of local rows 1 and 2 becomes two, row 3 and row 5.
    for whole, part, length in spec.extents(tensor_rank, tensor_size):
        local = box.clip(dim, part, length)
        if local is not None:
            yield local, local.move(dim, whole - part)


def to_local(spec: ParameterSpec, box: Box, tensor_rank: int, tensor_size: int) -> Iterator[tuple[Box, Box]]:
    """Yield pairs as from `to_whole`, for what one tensor rank holds of a box of the whole parameter."""
    dim = spec.sharding.dim
    if dim is None or tensor_size == 1:
        yield box, box
        return
    for whole, part, length in spec.extents(tensor_rank, tensor_size):
        shared = box.clip(dim, whole, length)
        if shared is not None:
            yield shared.move(dim, part - whole), shared


def real_numel(spec: ParameterSpec, tensor_rank: int, tensor_size: int) -> int:
    """Number of real elements of a local part: a prefix of it, since padding is the last rows of the vocabulary."""
    local = dims(spec.local_shape(tensor_size))
    if spec.real_rows is None:
        return math.prod(local)
    assert spec.sharding.dim in (None, 0), f"{spec.name}: padded rows of a parameter that is split along columns"
    assert len(spec.sharding.blocks) <= 1, f"{spec.name}: padded rows of a fused parameter"
    # 10 real rows of 4, padded to 12, on 2 ranks of 6 rows: rank 0 has 24 real elements, rank 1 has (10 - 6) * 4 = 16.
    before = 0 if spec.sharding.dim is None else tensor_rank * local[0]
    return min(max(spec.real_rows - before, 0), local[0]) * math.prod(local[1:])


def _put(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    return [Box((row, *box.start), (1, *box.size)) for box in boxes]
