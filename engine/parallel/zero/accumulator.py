"""Accumulation of a step's gradients on the rank that computes them, and one reduction per step: `reduce: step`.

A rank adds up the whole gradients of its stage in `reduce_dtype`, in buffers laid out as the shards are, so that one
reduce-scatter per buffer gives every data rank its share with no copy before or after. DeepSpeed's own hooks are
switched off (by the flag of its `coalesce_grad_reduction`, which would add gradients up in the weights' dtype). ZeRO-1
always works so; under ZeRO-2 and 3 this spends the memory that they save, and sends a gradient once per step instead of
once per micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.parallel.collectives import reduce_scatter
from engine.parallel.groups import Group
from engine.parallel.zero.optimizers import FlatShards, PartitionedShards, require


class Accumulator:
    """Accumulates the whole gradients of one stage, for the engine's optimizer."""

    def __init__(self, engine: Any, shards: FlatShards | PartitionedShards, zero: Group, dtype: torch.dtype) -> None:
        self._optimizer, self._shards, self._zero = engine.optimizer, shards, zero
        require(engine.optimizer, "_coalesce_grad_reduction", "averaged_gradients")
        engine.optimizer._coalesce_grad_reduction = True
        self._buffers: list[torch.Tensor] = []
        self._views: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        for views, size in shards.whole_gradients(zero.size):
            buffer = torch.zeros(size, dtype=dtype, device=engine.device)
            self._buffers.append(buffer)
            for parameter, shape, stride, start in views:
                # Row d of the view is data rank d's partition. Under ZeRO-3 the rows lie one rank's share apart.
                self._views[id(parameter)] = buffer.as_strided(shape, stride, start)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))

    def add(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        """Add a whole gradient of a parameter; its dtype may be narrower than the buffer's."""
        # ZeRO-3 pads a parameter to equal partitions: 7 elements on 2 ranks are rows of 4, one full and one of 3.
        flat, view = grad.reshape(-1), self._views[id(parameter)]
        width = view.size(1)
        full, rest = divmod(flat.numel(), width)
        view[:full].add_(flat[: full * width].view(full, width))
        if rest:
            view[full, :rest].add_(flat[full * width :])

    def reduce(self) -> None:
        """Give the optimizer this rank's share of the average over data ranks. Collective over the ZeRO group."""
        target = self._shards.reduced
        # Divided after the sum, in `reduce_dtype`: the average that DeepSpeed takes, which the loss scale undoes.
        shares = [reduce_scatter(buffer, self._zero, target).div_(self._zero.size) for buffer in self._buffers]
        for index, held in self._shards.split(shares):
            self._optimizer.averaged_gradients[index] = held

    def clear(self) -> None:
        """Set the buffers to zero; call between two steps.

        Not earlier: over one data rank the optimizer was given the buffers themselves.
        """
        for buffer in self._buffers:
            buffer.zero_()

    def holds(self, parameter: torch.nn.Parameter) -> bool:
        """Return True if a gradient of a parameter was not cleared."""
        return bool(self._views[id(parameter)].any())

    def close(self) -> None:
        """Take the hooks off the parameters: torch does not see that these keep the engine alive, which keeps them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter)
        if parameter.grad is not None:  # None where the gradient is deferred: it comes through `add`
            self.add(parameter, parameter.grad)
            parameter.grad = None  # freed at once: beside the buffers hardly more than one gradient exists at a time
