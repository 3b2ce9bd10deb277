"""Tensors that lie in files as boxes of consecutive elements, read by rows whatever the format that wrote them.

A reader of a format says of each tensor which boxes it consists of and at which bytes of which files their elements
are (`Extent`): one box of one extent for a plain file, one of several for a parameter that ZeRO has cut flat, several
boxes for one that ranks hold in parts. Reading is the same for all of them, and takes the bytes that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.checkpoint.geometry import Box, dims
from engine.checkpoint.storage import Location, Remote
from engine.errors import CheckpointError
from engine.parallel.sharding import Shape

HOLDERS: dict[torch.dtype, Any] = {
    torch.float64: np.int64,
    torch.float32: np.int32,
    torch.bfloat16: np.int16,
    torch.float16: np.int16,
}
"""Integers of the size of each dtype that is read: numpy has no bf16."""
BLOCK_BYTES = 16 << 20
"""Bytes that are read at a time where a part of each row is wanted."""


class Extent(NamedTuple):
    """Consecutive elements in one file."""

    file: Location
    start: int
    """First byte."""
    numel: int


@dataclass(frozen=True)
class StoredBox:
    """A box of a tensor whose elements, row-major, are those of some extents one after the other."""

    box: Box
    find: Callable[[], Sequence[Extent]]
    """Function that returns the extents; called when the box is first read."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its boxes, which are disjoint and cover it."""

    shape: Shape
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


def whole(shape: Shape, dtype: torch.dtype, extents: Iterable[Extent]) -> StoredTensor:
    """Return a tensor whose elements are those of some extents one after the other."""
    held = tuple(extents)
    box = Box((0,) * len(dims(shape)), dims(shape))
    return StoredTensor(shape, dtype, (StoredBox(box, lambda: held),))


def cut(extents: Sequence[Extent], start: int, length: int, item_bytes: int) -> list[Extent]:
    """Return the elements [start, start + length) of some extents, as extents."""
    found, at = [], 0
    for one in extents:
        low, high = max(start, at), min(start + length, at + one.numel)
        if low < high:
            found.append(Extent(one.file, one.start + (low - at) * item_bytes, high - low))
        at += one.numel
    return found


class StoredSource:
    """Stored tensors by name as a source."""

    def __init__(self, tensors: Mapping[str, StoredTensor], origin: str) -> None:
        self.tensors, self.origin, self.bytes_read = tensors, origin, 0

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        found = self.tensors[name].dtype
        if found not in HOLDERS:
            raise CheckpointError(
                f"{name} in {self.origin} is of the dtype {str(found).removeprefix('torch.')}",
                "fp32, bf16 or fp16",
                "convert weights that are not quantised",
            )
        return found

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        tensor, dtype = self.tensors[name], self.dtype(name)
        shape = list(dims(tensor.shape))
        shape[dim] = end - first
        if len(tensor.boxes) == 1 and dim == 0:
            row = math.prod(shape[1:])
            return self._elements(tensor.boxes[0].find(), first * row, end * row, dtype).view(shape)
        # NaN shows elements that no box covers, in files that say of themselves what is not so.
        found = torch.full(shape, torch.nan, dtype=dtype)
        for part in tensor.boxes:
            shared = part.box.clip(dim, first, end - first)
            if shared is not None:
                self._fill(found, part, shared, dim, first)
        return found

    def _fill(self, found: torch.Tensor, part: StoredBox, shared: Box, dim: int, first: int) -> None:
        """Copy what a box has of `found`, which begins at index `first` of `dim`, some rows at a time."""
        width = math.prod(part.box.size[1:])
        rows = max(1, BLOCK_BYTES // max(1, width * found.element_size()))
        begin = shared.start[0] - part.box.start[0]
        for low in range(begin, begin + shared.size[0], rows):
            high = min(low + rows, begin + shared.size[0])
            block = self._elements(part.find(), low * width, high * width, found.dtype)
            block = block.view(high - low, *part.box.size[1:])
            target = found.narrow(0, low + part.box.start[0] - (first if dim == 0 else 0), high - low)
            for each in range(1, found.dim()):
                # columns that are wanted of the box, and their place in what is returned
                start, size = shared.start[each], shared.size[each]
                block = block.narrow(each, start - part.box.start[each], size)
                target = target.narrow(each, start - (first if dim == each else 0), size)
            target.copy_(block)

    def _elements(self, extents: Sequence[Extent], first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the elements [first, end) of some extents, flat."""
        wanted = cut(extents, first, end - first, dtype.itemsize)
        parts = [read_extent(one, dtype) for one in wanted]
        found = parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=dtype), *parts])
        self.bytes_read += found.nbytes
        if found.numel() != end - first:
            raise CheckpointError(
                f"{self.origin} holds {found.numel()} of the {end - first} elements that it names of a tensor",
                "whole files",
                "copy it again",
            )
        return found


def read_extent(one: Extent, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements of an extent. Raises `CheckpointError` where the file has fewer or cannot be read."""
    stop = one.start + one.numel * dtype.itemsize
    try:
        if isinstance(one.file, Remote):
            # bytearray: an array over bytes could not be written to, as torch wants
            found = np.frombuffer(bytearray(one.file.read_range(one.start, stop)), HOLDERS[dtype])
        else:
            found = np.fromfile(one.file, HOLDERS[dtype], one.numel, offset=one.start)
    except OSError as error:
        raise _cut_short(one.file, str(error.strerror or error)) from error
    if found.size != one.numel:
        raise _cut_short(one.file, f"it ends before byte {stop}")
    return torch.from_numpy(found).view(dtype)


def _cut_short(file: Location, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read: {reason}", "whole files", "copy it again")
