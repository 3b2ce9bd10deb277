"""A checkpoint of ours as a source: the fp32 master weights by logical name, whatever the layout that saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from engine.checkpoint.load import Files, check_moment, fill_shard, open_checkpoint
from engine.checkpoint.storage import Location
from engine.parallel.sharding import ParameterSpec, Shape
from engine.parallel.state import ParameterShard

BLOCK_BYTES = 16 << 20
"""Bytes of a parameter that are mapped at a time."""


class CheckpointSource:
    """The weights of one checkpoint, or the values kept under the name of a moment.

    Parameters that were frozen have no such values. An average of the weights is their weights then (`or_weights`).
    """

    def __init__(self, path: Location, moment: str | None = None, or_weights: bool = True) -> None:
        """Open a checkpoint.

        Raises:
            CheckpointError: it is damaged, its files are not as its manifest says, or it holds no such moment.
        """
        self.path, self.manifest, self.bytes_read = path, open_checkpoint(path), 0
        self._moment, self._or_weights = moment, or_weights
        if moment is not None:
            check_moment(self.manifest, moment, path)
        self._files = Files(path, self.manifest)
        self._files.check_all()

    @property
    def origin(self) -> str:
        return str(self.path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        specs = self.manifest.specs.items()
        return {name: spec.stored_shape for name, spec in specs if self._or_weights or self._holds(name)}

    def _holds(self, name: str) -> bool:
        return self._moment in self.manifest.placements[name].moments

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        assert dim == 0, "parameters of ours are stored as they are"
        spec = self.manifest.specs[name]
        whole, row = ParameterSpec(name, spec.stored_shape), math.prod(spec.stored_shape[1:])
        held = self._moment if self._holds(name) else None
        found = torch.empty((end - first) * row)
        # Mapped pages count as memory of this process until the file is unmapped: never more than a block of them.
        rows = max(1, BLOCK_BYTES // (4 * max(1, row)))
        for start in range(first, end, rows):
            part = found[(start - first) * row : (min(start + rows, end) - first) * row]
            # a moment is read beside the weight of the same rows, which is let go
            weight, moments = (part, {}) if held is None else (torch.empty_like(part), {held: part})
            self.bytes_read += fill_shard(ParameterShard(whole, start * row, weight, moments), self._files)
            self._files.release()
        return found.view(end - first, *spec.stored_shape[1:])
