"""The largest difference per parameter between two checkpoints, or a checkpoint and other weights.

One parameter is in memory at a time, whatever the layouts that saved. What only one side has is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.checkpoint.load import Files, load_shards, open_checkpoint
from engine.checkpoint.manifest import WEIGHT, Manifest, key_of, moment_state
from engine.checkpoint.storage import Location
from engine.checkpoint.writers import stored_numel
from engine.parallel.sharding import ParameterSpec
from engine.parallel.state import ParameterShard


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


class Opened:
    """A checkpoint whose parameters are read one at a time."""

    def __init__(self, path: Location) -> None:
        """Open a checkpoint. Raises `CheckpointError` where it is damaged or its files are not as its manifest says."""
        self.path, self.manifest = path, open_checkpoint(path)
        Files(path, self.manifest).check_all()

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """Return all states of a parameter by key, whole, in its stored shape."""
        return {key_of(state, name): values for state, values in _read(self.path, self.manifest, name).items()}


class Weights(Protocol):
    """Weights alone, such as those of another library's folder."""

    @property
    def names(self) -> Mapping[str, bool]:
        """Logical names, with False for a weight that the configuration names and that is not there."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return a weight that is there."""
        ...


def compare(left: Opened, right: Opened | Weights) -> Iterator[Difference]:
    """Yield the difference of each parameter and state, in order of name.

    Where `right` are weights alone, moments of `left` are passed over.
    """
    theirs = dict.fromkeys(right.manifest.specs, True) if isinstance(right, Opened) else right.names
    for name in sorted(left.manifest.specs.keys() | theirs.keys()):
        there = theirs.get(name, False)
        if not there or name not in left.manifest.specs:
            yield Difference(key_of(WEIGHT, name), 0.0, 0, 0, _where(name in left.manifest.specs, there))
            continue
        ours = left.read(name)
        if isinstance(right, Opened):
            other = right.read(name)
        else:
            other, ours = {key_of(WEIGHT, name): right.read(name)}, {key_of(WEIGHT, name): ours[key_of(WEIGHT, name)]}
        for key in sorted(ours.keys() | other.keys()):
            yield _difference(key, ours.get(key), other.get(key))


def _where(in_first: bool, in_second: bool) -> str:
    """Name the only side that holds a weight; on neither it is one that the second's configuration names."""
    if in_first or in_second:
        return f"only in the {'first' if in_first else 'second'}"
    return "only in the configuration of the second: no file holds it"


def _difference(key: str, left: torch.Tensor | None, right: torch.Tensor | None) -> Difference:
    if left is None or right is None:
        return Difference(key, 0.0, 0, 0, _where(left is not None, right is not None))
    if left.shape != right.shape:
        return Difference(key, 0.0, 0, 0, f"{tuple(left.shape)} in the first, {tuple(right.shape)} in the second")
    # exact: other weights are at most fp32
    right = right.float()
    distance = (left.double() - right.double()).abs()
    distance[left == right] = 0.0  # equal infinities
    # As bits, so that equal NaNs are equal and 0.0 differs from -0.0.
    different = int((left.contiguous().view(torch.int32) != right.contiguous().view(torch.int32)).sum())
    largest = float(distance.max()) if distance.numel() else 0.0
    return Difference(key, largest, different, left.numel())


def _read(path: Location, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    placement = manifest.placements[name]
    # One rank that holds everything: the ordinary load puts the saved ranges together.
    whole = ParameterSpec(name, placement.spec.stored_shape)
    numel = stored_numel(whole)
    shard = ParameterShard(whole, 0, torch.empty(numel), {moment: torch.empty(numel) for moment in placement.moments})
    if not manifest.moments:
        shard = ParameterShard(whole, 0, shard.weight)
    load_shards(path, manifest, [shard])
    states = {WEIGHT: shard.weight} | {moment_state(moment): values for moment, values in shard.moments.items()}
    return {state: values.view(whole.shape) for state, values in states.items()}
