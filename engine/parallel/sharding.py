"""Division of parameters among tensor-parallel ranks: a table from name pattern to `Sharding`. Pure arithmetic.

One table per model family (`sharding(config)` in `engine.models`) serves the construction of tensor-parallel
layers, initial weights, checkpoints and conversion. A fused projection is described by its sub-blocks: each block is
split by itself, so that rank t of n holds the t-th of n equal parts of every block.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

Shape = tuple[int, ...]
Role = Literal["column", "row", "vocabulary", "heads", "replicated"]


@dataclass(frozen=True)
class Sharding:
    """Division of one parameter over the tensor axis.

    `role` is its use in the layer; `dim` the split dimension (None: every rank holds all of it); `blocks` the sizes of
    the sub-blocks along `dim` (empty: one block).
    """

    role: Role
    dim: int | None = None
    blocks: tuple[int, ...] = ()


REPLICATED = Sharding("replicated")
ROW = Sharding("row", dim=1)
VOCABULARY = Sharding("vocabulary", dim=0)
HEADS = Sharding("heads", dim=1)
"""A matrix (rows, heads), such as T5's relative positions: each rank has the columns of its own heads."""


def column(*blocks: int) -> Sharding:
    """Return the sharding along the output features, in the given sub-blocks."""
    return Sharding("column", dim=0, blocks=blocks)


Table = dict[str, Sharding]
"""Name pattern (shell style, over logical names) -> sharding; names that match nothing are replicated."""


def lookup(table: Table, name: str) -> Sharding:
    """Return the sharding of the parameter `name`; patterns must not overlap."""
    found = [sharding for pattern, sharding in table.items() if fnmatch.fnmatchcase(name, pattern)]
    assert len(found) <= 1, f"{name} matches {len(found)} patterns of the sharding table"
    return found[0] if found else REPLICATED


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model, whatever the layout.

    `shape` is that of all tensor ranks' parts together in memory; `real_rows` (vocabulary only) the number of its rows
    that are real: the others are padding, always zero and never stored.
    """

    name: str
    shape: Shape
    sharding: Sharding = field(default=REPLICATED)
    real_rows: int | None = None

    @property
    def stored_shape(self) -> Shape:
        """Shape without padding, as in a checkpoint."""
        return self.shape if self.real_rows is None else (self.real_rows, *self.shape[1:])

    def blocks(self) -> tuple[int, ...]:
        """Return the sizes of the sub-blocks along the split dimension."""
        assert self.sharding.dim is not None
        return self.sharding.blocks or (self.shape[self.sharding.dim],)

    def local_shape(self, tensor_size: int) -> Shape:
        """Return the shape of the part that each of `tensor_size` ranks holds."""
        dim = self.sharding.dim
        if dim is None:
            return self.shape
        assert all(block % tensor_size == 0 for block in self.blocks()), f"{self.name}: {tensor_size} ranks"
        return (*self.shape[:dim], self.shape[dim] // tensor_size, *self.shape[dim + 1 :])

    def local_numel(self, tensor_size: int) -> int:
        return math.prod(self.local_shape(tensor_size))

    def extents(self, tensor_rank: int, tensor_size: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start in the whole, start in the part, length) along the split dimension for each block."""
        # Blocks (4, 2, 2) on rank 1 of 2 give (2, 0, 2), (5, 2, 1), (7, 3, 1): the second half of each of q, k and v.
        whole = part = 0
        for block in self.blocks():
            share = block // tensor_size
            yield whole + tensor_rank * share, part, share
            whole += block
            part += share

    def rows_of_part(self, first: int, end: int, tensor_rank: int, tensor_size: int) -> Iterator[tuple[int, int]]:
        """Yield (first row in the whole, number of rows) for the rows [first, end) of one rank's part, in order."""
        if self.sharding.dim != 0 or tensor_size == 1:
            yield first, end - first
            return
        # Blocks (4, 2, 2) on rank 1 of 2, rows 1 to 4 of its part: row 3 of the whole, then 5, then 7.
        for whole, part, length in self.extents(tensor_rank, tensor_size):
            low, high = max(first, part), min(end, part + length)
            if low < high:
                yield whole + low - part, high - low

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the whole tensor (of `shape`) from the part of every tensor rank in order; inverse of `part`."""
        dim = self.sharding.dim
        if dim is None or len(parts) == 1:
            return parts[0]
        # Not `torch.cat(parts)`: with several blocks the ranks' parts alternate, q0 q1 k0 k1 v0 v1.
        whole = parts[0].new_empty(self.shape)
        for rank, part in enumerate(parts):
            for start, own, length in self.extents(rank, len(parts)):
                whole.narrow(dim, start, length).copy_(part.narrow(dim, own, length))
        return whole

    def part(self, whole: torch.Tensor, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """Return the part of `whole` (of `shape`) that one rank holds; a view where that is possible."""
        dim = self.sharding.dim
        if dim is None or tensor_size == 1:
            return whole
        runs = [whole.narrow(dim, start, length) for start, _, length in self.extents(tensor_rank, tensor_size)]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def describe(named: Iterable[tuple[str, torch.Tensor]], table: Table, vocab_size: int) -> list[ParameterSpec]:
    """Return the specifications of a whole model's parameters, given by logical name, in their order."""
    found = []
    for name, parameter in named:
        sharding = lookup(table, name)
        real_rows = vocab_size if sharding == VOCABULARY else None
        found.append(ParameterSpec(name, tuple(parameter.shape), sharding, real_rows))
    return found
