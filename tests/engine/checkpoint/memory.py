"""How much memory tensors take at a time, counted by torch's own operations."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """`peak`: the most bytes that storages made meanwhile, and alive together, had."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {arg.untyped_storage().data_ptr() for arg in args if _has_memory(arg)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if _has_memory(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        at = storage.data_ptr()
        if storage.nbytes() and at not in self._known:
            self._known[at] = weakref.ref(storage, lambda _: self._known.pop(at, None))
            # one that was resized meanwhile has other bytes than it was made with
            alive = [held for one in list(self._known.values()) if (held := one()) is not None]
            self.peak = max(self.peak, sum(held.nbytes() for held in alive))


def _has_memory(value: object) -> bool:
    """True of a tensor with elements somewhere: not of one on the device "meta", nor of a fake one."""
    return isinstance(value, torch.Tensor) and value.untyped_storage().device.type != "meta"
