"""When ZeRO-3 gathers weights: the next layer's while this one computes, and kept until a module or a step is done.

DeepSpeed looks ahead along a trace of the whole step, which a pipeline has none of (`stage3`). Here the order of
modules is remembered per chunk and direction, at the first pass, and at each module the gathers of the next one begin
before this one's are waited for: next is the next module that holds a matrix, with the small ones before it. The
gathers, their handles and the freeing are DeepSpeed's. All data ranks run the same modules, so they gather in the same
order.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from engine.parallel.zero.optimizers import require

GATHER = "_PartitionedParameterCoordinator__all_gather_params"
"""Starts an all-gather and registers its handle; DeepSpeed's own fetch waits for registered ones."""


class _Order:
    """Modules with parameters, as one pass of a chunk comes to them."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.known = False
        self.position = 0

    def come_to(self, module: nn.Module) -> list[nn.Module]:
        """What comes next, up to the next module with a matrix; nothing while the order is being learnt."""
        if not self.known:
            self.modules.append(module)
            return []
        if self.position == len(self.modules) or self.modules[self.position] is not module:
            self.modules, self.known, self.position = [], False, 0  # learnt anew at the next pass
            return []
        self.position += 1
        ahead = []
        for later in self.modules[self.position :]:
            ahead.append(later)
            if any(len(parameter.ds_shape) > 1 for parameter in own_parameters(later)):
                break
        return ahead


class Gathering:
    """Stands between DeepSpeed's module hooks and its coordinator, for one stage's engine."""

    def __init__(self, engine: Any, keep: bool) -> None:
        """`keep`: gathered weights stay until `free`, and not for their module's turn only."""
        self._module: nn.Module = engine.module
        self._coordinator = engine.optimizer.parameter_offload.param_coordinator
        require(
            self._coordinator, GATHER, "fetch_sub_module", "release_and_reset_all", "_clean_inflight_param_registry"
        )
        require(self._module, "ds_inflight_param_registry")
        self._fetch = self._coordinator.fetch_sub_module
        self._coordinator.fetch_sub_module = self._gather_ahead
        self._orders: dict[tuple[int, bool], _Order] = {}
        self._order = _Order()
        self._keep = keep
        for parameter in self._module.parameters() if keep else ():
            parameter.is_external_param = True  # type: ignore[attr-defined]  # what a module's end does not free

    def begin(self, chunk: int, backward: bool) -> None:
        """Call before a pass of a chunk."""
        self._order = self._orders.setdefault((chunk, backward), _Order())

    def end(self) -> None:
        """Call after it: nothing is under way between two passes."""
        if self._order.position < len(self._order.modules) and self._order.known:
            self._coordinator._clean_inflight_param_registry()
        self._order.known, self._order.position = bool(self._order.modules), 0

    def free(self) -> None:
        """Frees what was kept."""
        if self._keep:
            self._coordinator.release_and_reset_all(self._module)

    def _gather_ahead(self, module: nn.Module, forward: bool) -> None:
        """In the place of DeepSpeed's fetch: begins the gathers of this module and of the next, and waits for this."""
        if own_parameters(module):
            for one in (module, *self._order.come_to(module)):
                missing = [p for p in own_parameters(one) if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
                if missing:
                    getattr(self._coordinator, GATHER)(missing, forward)
        self._fetch(module, forward)


def own_parameters(module: nn.Module) -> list[Any]:
    """Of the module itself, not of those inside it; they carry DeepSpeed's attributes."""
    return list(module.parameters(recurse=False))
