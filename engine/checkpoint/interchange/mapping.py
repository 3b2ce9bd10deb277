"""The correspondence between the parameters of a model of ours and the tensors of another format, for all directions.

One `ParameterMap` says of one parameter which tensors of theirs hold it, and row by row where (`Run`). Import, export,
comparison and verification read the same fields: forward (`ours`), backward (`theirs`), and for some rows alone. What a
format does besides (transposed weights, fused blocks in parts, heads in another order, rows that ours lacks) is a list
of runs, so that nothing else has to know of it.

Invariant: the runs of a parameter cover each of its rows exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.parallel.sharding import ParameterSpec, Shape

Read = Callable[[str, int, int, int], torch.Tensor]
"""(tensor of theirs, first, end, dim) -> its indices [first, end) along `dim`, all of the other dimension."""


class Run(NamedTuple):
    """Consecutive rows that a parameter of ours and a tensor of theirs have in common."""

    tensor: str
    ours: int
    """First row of our parameter."""
    theirs: int
    """First row of their tensor; its first column where it is transposed."""
    length: int


@dataclass(frozen=True)
class ParameterMap:
    """One parameter of ours (stored shape, real rows only) and the tensors of theirs that hold it."""

    name: str
    shape: Shape
    tensors: Mapping[str, Shape]
    """Their tensors with the shapes that files have."""
    runs: tuple[Run, ...]
    transposed: bool = False
    """True if their matrices are (columns, rows) of ours."""

    def ours(self, read: Read, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Return the rows [first, end) of our parameter, of their dtype, from what `read` gives of their tensors.

        Only those rows are read. The result may share memory with what `read` returns.
        """
        end = self.shape[0] if end is None else end
        dim = int(self.transposed)
        parts = []
        for run in self.runs:
            low, high = max(first, run.ours), min(end, run.ours + run.length)
            if low < high:
                shift = run.theirs - run.ours
                part = read(run.tensor, low + shift, high + shift, dim)
                parts.append(part.t() if self.transposed else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def theirs(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of theirs from our whole parameter: a view where one run holds it, its dtype kept.

        Rows that ours lacks are 0.
        """
        rows = self.tensors[tensor][int(self.transposed)]
        runs = [run for run in self.runs if run.tensor == tensor]
        if len(runs) == 1 and runs[0].length == rows:
            made = value.narrow(0, runs[0].ours, rows)
        else:
            made = value.new_zeros((rows, *value.shape[1:]))
            for run in runs:
                made.narrow(0, run.theirs, run.length).copy_(value.narrow(0, run.ours, run.length))
        return made.t() if self.transposed else made


@dataclass(frozen=True)
class ModelMap:
    """The maps of all parameters of a model, by our names, and what else files of theirs may hold."""

    parameters: Mapping[str, ParameterMap]
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor of theirs -> the tensor that it repeats where a file has it, too, such as a tied head."""

    @property
    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of all tensors of theirs, in the order of our parameters."""
        return {name: shape for one in self.parameters.values() for name, shape in one.tensors.items()}

    def parts(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of theirs that one of our parameters becomes."""
        one = self.parameters[name]
        for tensor in one.tensors:
            yield tensor, one.theirs(tensor, value)


def unchanged(specs: Iterable[ParameterSpec]) -> ModelMap:
    """Return the map of a format that has our own names and whole tensors."""
    return own_names({spec.name: spec.stored_shape for spec in specs})


def own_names(shapes: Mapping[str, Shape]) -> ModelMap:
    """Return the map of a format that has our own names and whole tensors, of parameters by their stored shapes."""
    return ModelMap(
        {name: ParameterMap(name, shape, {name: shape}, (Run(name, 0, 0, shape[0]),)) for name, shape in shapes.items()}
    )


def mapped(
    spec: ParameterSpec, tensors: tuple[str, ...], transposed: bool = False, skipped: int = 0, per_head: int = 0
) -> ParameterMap:
    """Return the map of a parameter whose blocks are one tensor of theirs each, or all in one tensor.

    `transposed` holds for matrices; `skipped` is the number of rows at the head of their tensor that ours lacks. With
    `per_head` their one tensor has the blocks' rows head by head, `per_head` rows of each block at a time.
    """
    shape = spec.stored_shape
    transposed = transposed and len(shape) == 2
    blocks: tuple[int, ...] = spec.blocks() if len(tensors) > 1 or per_head else (shape[0],)
    runs, starts = [], [sum(blocks[:number]) for number in range(len(blocks))]
    if per_head:
        # Blocks q, k, v of heads of 2 rows: ours is q0 q0 q1 q1 k0 k0 ..., theirs q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 ...
        only = next(iter(tensors))
        for head in range(blocks[0] // per_head):
            for number, start in enumerate(starts):
                at = (head * len(blocks) + number) * per_head
                runs.append(Run(only, start + head * per_head, at, per_head))
        runs.sort(key=lambda run: run.ours)
        blocks = (shape[0],)
    else:
        runs = [Run(name, start, skipped, rows) for name, start, rows in zip(tensors, starts, blocks, strict=True)]
    shapes: dict[str, Shape] = {name: (rows + skipped, *shape[1:]) for name, rows in zip(tensors, blocks, strict=True)}
    if transposed:
        shapes = {name: tuple(reversed(shape)) for name, shape in shapes.items()}
    return ParameterMap(spec.name, shape, shapes, tuple(runs), transposed)
