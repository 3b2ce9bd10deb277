"""Gradients of a step accumulated where they are made and reduced once: `reduce: step`.

A rank adds up the whole gradients of its stage in `reduce_dtype`, in buffers that lie as the shards do, so that one
reduce-scatter per buffer hands every data rank its share with nothing copied before or after. DeepSpeed's own hooks
are told to leave gradients alone (the switch of its `coalesce_grad_reduction`, which would add them up in the weights'
dtype). ZeRO-1 always works so; under ZeRO-2 and 3 it spends the memory that they save, and sends a gradient once per
step instead of once per micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.parallel.collectives import reduce_scatter
from engine.parallel.groups import Group
from engine.parallel.zero.optimizers import FlatShards, PartitionedShards, require


class Accumulator:
    """Whole gradients of one stage, for the engine's optimizer."""

    def __init__(self, engine: Any, shards: FlatShards | PartitionedShards, zero: Group, dtype: torch.dtype) -> None:
        self._optimizer, self._shards, self._zero = engine.optimizer, shards, zero
        require(engine.optimizer, "_coalesce_grad_reduction", "averaged_gradients")
        engine.optimizer._coalesce_grad_reduction = True
        self._buffers: list[torch.Tensor] = []
        self._views: dict[int, torch.Tensor] = {}
        for views, size in shards.whole_gradients(zero.size):
            buffer = torch.zeros(size, dtype=dtype, device=engine.device)
            self._buffers.append(buffer)
            for parameter, shape, stride, start in views:
                self._views[id(parameter)] = buffer.as_strided(shape, stride, start)
                parameter.register_post_accumulate_grad_hook(self._take)

    def add(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        """Adds a whole gradient of a parameter; its own dtype may be narrower."""
        flat, view = grad.reshape(-1), self._views[id(parameter)]
        width = view.size(1)
        full, rest = divmod(flat.numel(), width)
        view[:full].add_(flat[: full * width].view(full, width))
        if rest:
            view[full, :rest].add_(flat[full * width :])

    def reduce(self) -> None:
        """Gives the optimizer this rank's share of the average over data ranks. Collective over the ZeRO group."""
        target = self._shards.reduced
        shares = [reduce_scatter(buffer, self._zero, target).div_(self._zero.size) for buffer in self._buffers]
        for index, held in self._shards.split(shares):
            self._optimizer.averaged_gradients[index] = held

    def clear(self) -> None:
        """Call between two steps; over one data rank the optimizer was given the buffers themselves."""
        for buffer in self._buffers:
            buffer.zero_()

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a gradient of a parameter is left."""
        return bool(self._views[id(parameter)].any())

    def _take(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter.grad is not None:  # put off, it comes by `add`
            self.add(parameter, parameter.grad)
            parameter.grad = None
