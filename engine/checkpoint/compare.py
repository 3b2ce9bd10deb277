"""The largest difference per parameter between two sources of weights, of whatever formats.

Some rows of a parameter are in memory at a time, whatever the layouts that saved. What only one side has is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.checkpoint.load import Files, fill_shard, open_checkpoint
from engine.checkpoint.manifest import WEIGHT, key_of
from engine.checkpoint.storage import Location
from engine.parallel.sharding import ParameterSpec, Shape
from engine.parallel.state import ParameterShard

BLOCK_NUMEL = 1 << 22
"""Elements of a parameter that are compared at a time."""


@dataclass(frozen=True)
class Difference:
    """One state of one parameter on two sides."""

    key: str
    """`model.<parameter>` or `optim.<moment>.<parameter>`."""
    largest: float
    """Largest absolute difference of an element; NaN where one side has a NaN."""
    num_different: int
    """Elements that differ bitwise."""
    numel: int
    problem: str = ""
    """Reason why they cannot be compared; empty where they can."""


class Side(Protocol):
    """Weights, and moments where there are any, by the names of our parameters."""

    @property
    def names(self) -> Mapping[str, bool]:
        """Logical names, with False for a weight that the configuration names and that is not there."""
        ...

    def states(self, name: str) -> Sequence[str]:
        """Return the states of a parameter that is there: `model` first, then `optim.<moment>`."""
        ...

    def shape(self, name: str) -> Shape:
        """Return the shape of a parameter that is there."""
        ...

    def rows(self, name: str, state: str, first: int, end: int) -> torch.Tensor:
        """Return rows [first, end) of a state of a parameter, fp32."""
        ...


class Opened:
    """A checkpoint of ours as a side of a comparison."""

    def __init__(self, path: Location) -> None:
        """Open a checkpoint. Raises `CheckpointError` where it is damaged or its files are not as its manifest says."""
        self.path, self.manifest = path, open_checkpoint(path)
        self._files = Files(path, self.manifest)
        self._files.check_all()

    @property
    def names(self) -> Mapping[str, bool]:
        return dict.fromkeys(self.manifest.specs, True)

    def states(self, name: str) -> Sequence[str]:
        return self.manifest.states_of(name)

    def shape(self, name: str) -> Shape:
        return self.manifest.specs[name].stored_shape

    def rows(self, name: str, state: str, first: int, end: int) -> torch.Tensor:
        shape = self.shape(name)
        width = math.prod(shape[1:])
        spec, moment = ParameterSpec(name, shape), state.removeprefix("optim.")
        weight = torch.empty((end - first) * width)
        moments = {} if state == WEIGHT else {moment: torch.empty_like(weight)}
        fill_shard(ParameterShard(spec, first * width, weight, moments), self._files)
        # mapped pages count as memory of this process until the file is unmapped
        self._files.release()
        return (moments[moment] if moments else weight).view(end - first, *shape[1:])

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """Return all states of a parameter by key, whole, in its stored shape."""
        rows = self.shape(name)[0]
        return {key_of(state, name): self.rows(name, state, 0, rows) for state in self.states(name)}


def compare(left: Side, right: Side) -> Iterator[Difference]:
    """Yield the difference of each parameter and state, in order of name.

    Where one side has weights alone, moments of the other are passed over.
    """
    ours, theirs = left.names, right.names
    alone = any(
        all(len(side.states(name)) == 1 for name, there in side.names.items() if there) for side in (left, right)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name, False), theirs.get(name, False)
        if not here or not there:
            problem = _where(here, there) if here or there else _nowhere(name in ours)
            yield Difference(key_of(WEIGHT, name), 0.0, 0, 0, problem)
            continue
        first, second = ([WEIGHT] if alone else side.states(name) for side in (left, right))
        for state in sorted({*first, *second}):
            if state not in first or state not in second:
                yield Difference(key_of(state, name), 0.0, 0, 0, _where(state in first, state in second))
            else:
                yield _difference(name, state, left, right)


def _where(in_first: bool, in_second: bool) -> str:
    """Name the only side that holds a weight."""
    assert in_first != in_second
    return f"only in the {'first' if in_first else 'second'}"


def _nowhere(in_first: bool) -> str:
    """Name the side whose configuration has a weight that no file of either side holds."""
    return f"only in the configuration of the {'first' if in_first else 'second'}: no file holds it"


def _difference(name: str, state: str, left: Side, right: Side) -> Difference:
    key, shape, other = key_of(state, name), tuple(left.shape(name)), tuple(right.shape(name))
    if shape != other:
        return Difference(key, 0.0, 0, 0, f"{shape} in the first, {other} in the second")
    largest, different = 0.0, 0
    rows = max(1, BLOCK_NUMEL // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        end = min(first + rows, shape[0])
        one = left.rows(name, state, first, end)
        # exact: other weights are at most fp32
        two = right.rows(name, state, first, end).float()
        distance = (one.double() - two.double()).abs_()
        distance[one == two] = 0.0  # equal infinities
        # As bits, so that equal NaNs are equal and 0.0 differs from -0.0.
        different += int((one.contiguous().view(torch.int32) != two.contiguous().view(torch.int32)).sum())
        found = float(distance.max())
        largest = found if math.isnan(found) or found > largest else largest
    return Difference(key, largest, different, math.prod(shape))
