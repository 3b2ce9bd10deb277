"""A checkpoint of ours as a source: the fp32 master weights by logical name, whatever the layout that saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from engine.checkpoint.load import Files, check_moment, fill_shard, open_checkpoint
from engine.checkpoint.storage import Location
from engine.parallel.sharding import ParameterSpec, Shape
from engine.parallel.state import ParameterShard


class CheckpointSource:
    """The weights of one checkpoint, or the values kept under the name of a moment (an average of the weights).

    Parameters that were frozen have no such values and keep their weights.
    """

    def __init__(self, path: Location, moment: str | None = None) -> None:
        """Open a checkpoint.

        Raises:
            CheckpointError: it is damaged, its files are not as its manifest says, or it holds no such moment.
        """
        self.path, self.manifest, self.bytes_read = path, open_checkpoint(path), 0
        self._moment = moment
        if moment is not None:
            check_moment(self.manifest, moment, path)
        self._files = Files(path, self.manifest)
        self._files.check_all()

    @property
    def origin(self) -> str:
        return str(self.path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: spec.stored_shape for name, spec in self.manifest.specs.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        assert dim == 0, "parameters of ours are stored as they are"
        spec = self.manifest.specs[name]
        whole, row = ParameterSpec(name, spec.stored_shape), math.prod(spec.stored_shape[1:])
        values = torch.empty((end - first) * row)
        held = self._moment if self._moment in self.manifest.placements[name].moments else None
        moments = {} if held is None else {held: torch.empty_like(values)}
        self.bytes_read += fill_shard(ParameterShard(whole, first * row, values, moments), self._files)
        # mapped pages count as memory of this process until the file is unmapped
        self._files.release()
        return (values if held is None else moments[held]).view(end - first, *spec.stored_shape[1:])
