"""Tensors of a folder of another format, before they have our names: states of tensors, each in one part or several.

A tensor has a part for each model-parallel rank that wrote it. Whether the parts are copies of each other or pieces,
and along which dimension, no file says; it follows from the shape that the model's tensor has (`joined`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint.geometry import Box
from engine.checkpoint.interchange.sources.stored import StoredBox, StoredTensor, cut
from engine.checkpoint.manifest import WEIGHT
from engine.checkpoint.storage import Location
from engine.parallel.sharding import Shape

FACTS = "palimpsest.json"
"""File beside what `convert` writes in other formats: the model, and what else their files have no place for."""

Parts = dict[str, list[StoredTensor]]
"""Parts of each tensor, in the order of the model-parallel ranks that wrote them."""


@dataclass(frozen=True)
class Unnamed:
    """Tensors of a folder under the names that its files have."""

    origin: str
    kind: str
    """Format in words, for messages."""
    states: Mapping[str, Parts]
    """Weights (`manifest.WEIGHT`), and moments by the names that `torch.optim` gives them."""
    step: int | None = None
    """Optimizer steps taken, where the files say it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Content of `FACTS`; empty for a folder that others wrote."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the program that wrote it, as Megatron-LM and its kin save them."""

    @property
    def weights(self) -> Parts:
        return self.states[WEIGHT]

    @property
    def moments(self) -> list[str]:
        return [state for state in self.states if state != WEIGHT]


def read_facts(*folders: Location) -> dict[str, Any]:
    """Return the content of `FACTS` in the first of some folders that has it; empty where there is none or no JSON."""
    for folder in folders:
        try:
            found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def joined(
    parts: Sequence[StoredTensor], shape: Shape, blocks: Sequence[int] = (), is_padded: bool = False
) -> StoredTensor | None:
    """Return the tensor of `shape` that some parts make up, or None where they do not.

    Equal parts are copies; else they are pieces along the one dimension in which they are smaller, each with its share
    of every block of `blocks` (rows of a fused matrix; of one block where there are none). With `is_padded` rows beyond
    the shape's are padding of the vocabulary, and are left out.
    """
    first = parts[0]
    if any(part.shape != first.shape for part in parts) or len(first.shape) != len(shape):
        return None
    if first.shape == shape:
        return first
    differing = [dim for dim, size in enumerate(shape) if first.shape[dim] != size]
    if len(differing) > 1:
        return None
    (dim,) = differing
    local, whole = first.shape[dim], shape[dim]
    if local * len(parts) != whole and not (is_padded and dim == 0 and local * len(parts) > whole):
        return None
    sizes = blocks if len(blocks) > 1 and sum(blocks) == whole == local * len(parts) else (local * len(parts),)
    boxes = []
    for rank, part in enumerate(parts):
        at = 0
        for number, size in enumerate(sizes):
            share = size // len(parts)
            begin = sum(sizes[:number]) + rank * share
            length = min(share, whole - begin)
            if length > 0:
                boxes += _cut_out(part, dim, at, length, begin)
            at += share
    return StoredTensor(shape, first.dtype, tuple(boxes))


def _cut_out(part: StoredTensor, dim: int, first: int, length: int, to: int) -> list[StoredBox]:
    """Return the indices [first, first + length) along `dim` of a part as boxes of the whole, where they begin at
    `to`."""
    found = []
    for one in part.boxes:
        shared = one.box.clip(dim, first, length)
        if shared is None:
            continue
        if dim == 0:
            row = math.prod(one.box.size[1:])
            begin, count = (shared.start[0] - one.box.start[0]) * row, shared.size[0] * row
            found.append(StoredBox(shared.move(0, to - first), _slice(one, begin, count, part)))
        else:
            # whole rows are in the file: only a part that is taken whole stays a box of its own
            assert shared == one.box, "parts are cut along their rows alone"
            found.append(StoredBox(Box(one.box.start, one.box.size).move(dim, to - first), one.find))
    return found


def _slice(one: StoredBox, begin: int, count: int, part: StoredTensor):
    return lambda: cut(one.find(), begin, count, part.dtype.itemsize)
