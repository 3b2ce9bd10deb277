"""Flat ranges that each rank stores of each parameter, and the copies that fill what a loading rank needs.

The rule is a formula over `Placement` and coordinates, never a table: a tied parameter is stored by its first
stage, a replicated one by tensor rank 0, padding by nobody, and each data rank stores its own range. Here
`data_rank` is the position in the ZeRO group (data x sequence). Invariant: over all writers each real element is
stored exactly once, so saving needs no gather.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.checkpoint.geometry import Box, dims, flat_boxes, flat_span, real_numel, to_local, to_whole
from engine.parallel.groups import Groups
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import Placement

_NAME = re.compile(r"stage-(\d+)-data-(\d+)-tensor-(\d+)\.safetensors")


class Writer(NamedTuple):
    """One rank as a writer of a file. `stage` is its pipeline stage."""

    stage: int
    data_rank: int
    tensor_rank: int

    @property
    def file_name(self) -> str:
        return f"stage-{self.stage:02d}-data-{self.data_rank:04d}-tensor-{self.tensor_rank:02d}.safetensors"

    @classmethod
    def of(cls, groups: Groups) -> Writer:
        """Return the writer that this rank is."""
        return cls(groups.coordinates.stage, groups.zero.position, groups.coordinates.tensor_rank)

    @classmethod
    def parse(cls, file_name: str) -> Writer | None:
        """Return the writer of a file, or None where the name is not exactly one that a writer gives."""
        found = _NAME.fullmatch(file_name)
        writer = cls(*map(int, found.groups())) if found else None
        # Written anew and compared: stage-00 and stage-000 would parse to the same writer.
        return writer if writer is not None and writer.file_name == file_name else None


def stored_range(placement: Placement, writer: Writer, tensor_size: int) -> tuple[int, int]:
    """Return (start, length) of what a writer stores of the flattened local part; length 0 where it stores nothing."""
    spec = placement.spec
    # One writer for each copy: tied weights by their first stage, replicated ones by tensor rank 0.
    if writer.stage != placement.stages[0] or (spec.sharding.dim is None and writer.tensor_rank > 0):
        return 0, 0
    return placement.range_of(writer.data_rank, real_numel(spec, writer.tensor_rank, tensor_size))


def tensor_ranks(spec: ParameterSpec, tensor_size: int) -> range:
    """Return the tensor ranks that store something of a parameter."""
    return range(1 if spec.sharding.dim is None else tensor_size)


def writers_of(placement: Placement, data_size: int, tensor_size: int) -> Iterator[Writer]:
    """Yield every writer that stores something of a parameter; as many steps as there are such writers."""
    for tensor_rank in tensor_ranks(placement.spec, tensor_size):
        numel = real_numel(placement.spec, tensor_rank, tensor_size)
        if numel:
            for data_rank in data_ranks(placement, 0, numel - 1, data_size):
                yield Writer(placement.stages[0], data_rank, tensor_rank)


def data_ranks(placement: Placement, first: int, last: int, data_size: int) -> range:
    """Return the data ranks whose ranges meet the flat positions [first, last] of a local part."""
    # Rank d holds [d * partition - offset, (d + 1) * partition - offset). With partition 10 and offset 3 rank 0 holds
    # [0, 7) and rank 1 [7, 17), so positions 5 to 12 give (5 + 3) // 10 = 0 to (12 + 3) // 10 = 1.
    low = (first + placement.offset) // placement.partition
    high = (last + placement.offset) // placement.partition
    return range(low, min(high + 1, data_size))


@dataclass(frozen=True)
class Need:
    """A flat range of a local part that a loading rank wants filled."""

    spec: ParameterSpec
    start: int
    length: int
    tensor_rank: int
    tensor_size: int

    @property
    def real_length(self) -> int:
        """Number of its first elements that are real; the rest is padding."""
        return min(max(real_numel(self.spec, self.tensor_rank, self.tensor_size) - self.start, 0), self.length)


@dataclass(frozen=True)
class Transfer:
    """One strided copy: `source` is a box of the writer's local part, `target` of the reader's, of equal size."""

    writer: Writer
    source: Box
    target: Box


def transfers(need: Need, saved: Placement, data_size: int, tensor_size: int) -> Iterator[Transfer]:
    """Yield the copies that fill the real elements of `need` from what ranks of another layout have stored.

    `data_size` and `tensor_size` are those of the layout that saved. Each real element is copied exactly once.
    """
    spec = need.spec
    # reader's local part -> whole parameter -> saved local parts -> flat ranges of writers; `carry` then shifts each
    # box that is left back to the reader's coordinates.
    boxes = flat_boxes(dims(spec.local_shape(need.tensor_size)), need.start, need.real_length)
    for box in boxes:
        for target, whole in to_whole(spec, box, need.tensor_rank, need.tensor_size):
            for tensor_rank in tensor_ranks(saved.spec, tensor_size):
                for source, shared in to_local(saved.spec, whole, tensor_rank, tensor_size):
                    for writer, shard in _stored(source, saved, tensor_rank, data_size, tensor_size):
                        # saved local part -> whole -> reader's local part
                        there = shard.carry(source, shared).carry(whole, target)
                        yield Transfer(writer, shard, there)


def _stored(
    box: Box, saved: Placement, tensor_rank: int, data_size: int, tensor_size: int
) -> Iterator[tuple[Writer, Box]]:
    """Yield the parts of a box of a saved local part, with the writer of each."""
    shape = dims(saved.spec.local_shape(tensor_size))
    first, last = flat_span(box, shape)
    for data_rank in data_ranks(saved, first, last, data_size):
        writer = Writer(saved.stages[0], data_rank, tensor_rank)
        # Boxes of one range are disjoint, and ranges of two writers, too, so no element is copied twice.
        for held in flat_boxes(shape, *stored_range(saved, writer, tensor_size)):
            shared = box.meet(held)
            if shared is not None:
                yield writer, shared


def stored_numel(spec: ParameterSpec) -> int:
    """Number of elements of a parameter in a checkpoint."""
    return math.prod(spec.stored_shape)
