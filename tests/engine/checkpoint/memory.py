"""How much memory tensors take at a time, counted by torch's own operations."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """`peak`: the most bytes that storages made meanwhile, and alive together, had."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {arg.untyped_storage().data_ptr() for arg in args if _has_memory(arg)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if _has_memory(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, num_bytes = storage.data_ptr(), storage.nbytes()
        if num_bytes and at not in self._known:
            self._known.add(at)
            self.held += num_bytes
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._gone, at, num_bytes)

    def _gone(self, at: int, num_bytes: int) -> None:
        self._known.discard(at)
        self.held -= num_bytes


def _has_memory(value: object) -> bool:
    """True of a tensor with elements somewhere: not of one on the device "meta", nor of a fake one."""
    return isinstance(value, torch.Tensor) and value.untyped_storage().device.type != "meta"
