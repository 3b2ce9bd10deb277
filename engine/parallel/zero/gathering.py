"""Gathering of ZeRO-3's weights: the next layer's while this one computes, kept until a module or a step is done.

DeepSpeed looks ahead along a trace of the whole step, which does not exist under a pipeline (`stage3`). Here the order
of modules is recorded per chunk and direction in the first pass. At each module the gathers of the next one start
before this one's are waited for: next is the next module that holds a matrix, with the small ones before it. The
gathers, their handles and the freeing are DeepSpeed's. All data ranks run the same modules, so they gather in the same
order.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from engine.parallel.zero.optimizers import require
from engine.parallel.zero.stage3 import offload_of

GATHER = "_PartitionedParameterCoordinator__all_gather_params"
"""Name (mangled: private to its class) of the method that starts an all-gather and registers its handle. DeepSpeed's
own fetch waits for registered handles."""


class _Order:
    """Modules with parameters, in the order in which one pass of a chunk reaches them."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.known = False
        self.position = 0

    def come_to(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that follow, up to the next one with a matrix; none while the order is being recorded."""
        if not self.known:
            self.modules.append(module)
            return []
        # The pass has left the recorded order: it goes on without looking ahead, and the next one records anew.
        if self.position == len(self.modules) or self.modules[self.position] is not module:
            self.modules, self.known, self.position = [], False, 0
            return []
        self.position += 1
        ahead = []
        # In linear, norm, linear: the first linear starts the gathers of the norm and of the second linear. The norm
        # alone would leave too little computation to hide the second one's gather behind.
        for later in self.modules[self.position :]:
            ahead.append(later)
            if any(len(parameter.ds_shape) > 1 for parameter in own_parameters(later)):
                break
        return ahead


class Gathering:
    """A layer between DeepSpeed's module hooks and its coordinator, for one stage's engine."""

    def __init__(self, engine: Any, keep: bool) -> None:
        """Replace the coordinator's fetch. With `keep` gathered weights stay until `free`, not only while in use."""
        self._module: nn.Module = engine.module
        self._coordinator = offload_of(engine).param_coordinator
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
            # DeepSpeed frees the parameters of a module when it ends, except those that other modules use as well.
            parameter.is_external_param = True  # type: ignore[attr-defined]

    def begin(self, chunk: int, backward: bool) -> None:
        """Select the recorded order of a chunk and direction; call before the pass."""
        self._order = self._orders.setdefault((chunk, backward), _Order())

    def end(self) -> None:
        """Free weights that were gathered for modules which the pass did not reach; call after the pass.

        No gather is then under way between two passes.
        """
        if self._order.position < len(self._order.modules) and self._order.known:
            self._coordinator._clean_inflight_param_registry()
        self._order.known, self._order.position = bool(self._order.modules), 0

    def free(self) -> None:
        """Free the weights that were kept."""
        if self._keep:
            self._coordinator.release_and_reset_all(self._module)

    def _gather_ahead(self, module: nn.Module, forward: bool) -> None:
        """Start the gathers of this module and of the next, and wait for this one's; replaces DeepSpeed's fetch."""
        if own_parameters(module):
            for one in (module, *self._order.come_to(module)):
                missing = [p for p in own_parameters(one) if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
                if missing:
                    getattr(self._coordinator, GATHER)(missing, forward)
        self._fetch(module, forward)


def own_parameters(module: nn.Module) -> list[Any]:
    """Return the parameters of the module itself, not of its submodules; they have DeepSpeed's attributes."""
    return list(module.parameters(recurse=False))
