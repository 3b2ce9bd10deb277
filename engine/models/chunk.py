"""Which consecutive part of a model one pipeline stage (or virtual stage) holds. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """`layers` by global index, with the embedding if `first`, and the final norm and the head if `last`."""

    layers: range
    first: bool
    last: bool


def whole(num_layers: int) -> Chunk:
    """The chunk that is the whole model."""
    return Chunk(range(num_layers), first=True, last=True)
