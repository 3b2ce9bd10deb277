"""Comparison of a folder in another format that was just written with what it was made from, bit for bit.

The folder is opened by the reader of its format, and read back through the mapping that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from engine.checkpoint.interchange.convert import Verify, compare_weights
from engine.checkpoint.interchange.initial import Format, open_unnamed
from engine.checkpoint.interchange.mapping import ModelMap
from engine.checkpoint.interchange.source_model import SourceWeights
from engine.checkpoint.interchange.sources.stored import StoredSource
from engine.checkpoint.manifest import WEIGHT
from engine.parallel.sharding import Shape


def check_written(kind: Format, folder: Path, opened: SourceWeights, target: ModelMap, verify: Verify) -> None:
    """Compare weights, and those moments that the folder holds, with their source; `target` has the folder's names.

    Raises:
        CheckpointError: names the first parameter that differs, or a file that cannot be read.
    """
    if verify == "none":
        return
    found = open_unnamed(folder, kind)
    for state, parts in found.states.items():
        # torch's DCP has the weights under `model.`
        tensors = {name.removeprefix("model.") if kind == "dcp" else name: held[0] for name, held in parts.items()}
        written = StoredSource(tensors, found.origin)
        held = {name: one for name, one in target.parameters.items() if one.tensors.keys() <= tensors.keys()}
        if state == WEIGHT:
            assert held.keys() == target.parameters.keys(), "each parameter was written"
        compare_weights(_OwnNames(opened, state), ModelMap(held), written, lambda _: torch.float32, verify)


class _OwnNames:
    """A state of a source by the names of our parameters."""

    def __init__(self, opened: SourceWeights, state: str) -> None:
        self._opened, self._state = opened, state

    @property
    def origin(self) -> str:
        return self._opened.source.origin

    @property
    def bytes_read(self) -> int:
        return self._opened.bytes_read

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: one.shape for name, one in self._opened.map.parameters.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        assert dim == 0, "parameters of ours are read by rows"
        return self._opened.read(name, first, end, self._state)
