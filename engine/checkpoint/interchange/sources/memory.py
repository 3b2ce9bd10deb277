"""Tensors in this process's memory as a source: a live model, or a format that is read whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.parallel.sharding import Shape


class MemorySource:
    """Named tensors; reads are copies."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
        self._tensors, self.origin, self.bytes_read = tensors, origin, 0

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, first: int, end: int, dim: int = 0) -> torch.Tensor:
        found = self._tensors[name].detach().narrow(dim, first, end - first).clone()
        self.bytes_read += found.nbytes
        return found
