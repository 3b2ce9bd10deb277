"""Patches of DeepSpeed's ZeRO-3 for a pipeline, where one forward pass is not followed by its backward pass.

DeepSpeed records the order of modules in a forward and backward pass, checks over the whole world that all ranks
recorded the same one, and counts down per module when its backward is over. Stages of a pipeline run different
modules, and have several forward passes in flight. So the trace is never started (parameters are fetched when they
are needed, which also turns DeepSpeed's prefetch off) and each module's countdown is set anew before a backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero import stage3 as optimizer_module
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.utils import groups as ds_groups
from torch import nn

from engine.parallel.zero.optimizers import require


def partition_empty(
    module: nn.Module, dtype: torch.dtype, device: torch.device, mpu: Any, config: dict, near: Any = None
) -> None:
    """Replace every (meta) parameter by one that is already partitioned, one at a time: never a whole stage in memory.

    `near` is the process group of the ranks that keep a second copy between them. DeepSpeed would cut such groups out
    of consecutive ranks of the world, whatever the axes, and it asks the group of its module for size and position.

    The values are zero until `StageEngine.fill`. Parameters that modules share stay shared.
    """
    require(ds_groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    ds_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = near
    context = deepspeed.zero.Init(
        module=nn.Module(),  # empty: `made` converts the parameters one at a time, off the meta device
        data_parallel_group=mpu.get_data_parallel_group(),
        zero_param_parallel_group=near,
        config_dict_or_path=config,
        dtype=dtype,
        mpu=mpu,
    )
    require(context, "_convert_to_deepspeed_param")
    # DeepSpeed's forward adds the bias in place, to a product that selective recomputation has kept: the second run
    # would add it once more.
    LinearFunctionForZeroStage3.forward = staticmethod(_linear)

    def made(meta: nn.Parameter) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(meta.shape, dtype=dtype, device=device), meta.requires_grad)
        context._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        return parameter

    replace_parameters(module, made)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `torch.nn.functional.linear`, under whose name DeepSpeed has put its own function."""
    return torch._C._nn.linear(input, weight, bias)  # type: ignore[attr-defined]


def replace_parameters(module: nn.Module, made: Any) -> None:
    """Replace each parameter by `made(parameter)`; parameters that modules share stay shared."""
    new: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                if id(parameter) not in new:
                    new[id(parameter)] = made(parameter)
                owner._parameters[name] = new[id(parameter)]


def _kept_while_recomputed(release: Any) -> Any:
    """Wrap DeepSpeed's release so that weights gathered for a recomputation stay until the backward pass has used them.

    Released after the second run they would be missing in a backward pass that has begun, and gathered a third time.
    """

    def release_after_use(module: nn.Module, forward: bool = False) -> None:
        # torch numbers the backward pass under way, -1 outside of one: a forward inside of it is a recomputation.
        recomputing = forward and torch._C._current_graph_task_id() != -1
        if not recomputing:
            release(module, forward=forward)

    return release_after_use


@contextlib.contextmanager
def no_barrier() -> Iterator[None]:
    """Leave out DeepSpeed's barriers over the world while an engine is made.

    Its optimizer for ZeRO-3 waits for all ranks there, and stages that train nothing have none.
    """
    with patch.object(optimizer_module.dist, "barrier", lambda *_, **__: None):
        yield


def offload_of(engine: Any) -> Any:
    """Return what gathers and frees the weights of an engine: its optimizer's, or itself where nothing is trained."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def forget_modules() -> None:
    """Let go of the modules that DeepSpeed's stack of running modules holds, of all engines of this process."""
    parameter_offload.FWD_MODULE_STACK.clear()


class DeepSpeedPatches:
    """Patches of a ZeRO-3 engine: some applied once, some before each of its backward passes."""

    def __init__(self, engine: Any) -> None:
        coordinator = offload_of(engine).param_coordinator
        require(coordinator, "reset_step", "is_complete_trace", "is_record_trace", "release_sub_module")
        self.optimizer = engine.optimizer if engine.optimizer is not offload_of(engine) else None
        if self.optimizer is not None:
            require(self.optimizer, "clear_backward_seen_flag", "grad_partitions_flat_buffer")
        # Called at each forward pass, where it would start the trace and compare it with ranks that run other modules.
        # With several forward passes in flight no recorded order of modules ever matches, so none is recorded.
        coordinator.reset_step = lambda: None
        coordinator.release_sub_module = _kept_while_recomputed(coordinator.release_sub_module)
        self.chunks = engine.module.chunks
        self._countdowns: dict[int, list[tuple[nn.Module, int]]] = {}

    def after_forward(self, chunk: int) -> None:
        """Record the number of gradients that end each module's backward: the same at every forward pass."""
        if chunk not in self._countdowns:
            self._countdowns[chunk] = [
                (module, module.__dict__["ds_grads_remaining"])
                for module in self.chunks[chunk].modules()
                if "ds_grads_remaining" in module.__dict__  # containers are never called
            ]
            assert self._countdowns[chunk], "DeepSpeed counts gradients in Module.ds_grads_remaining"

    def before_backward(self, chunk: int, is_first: bool) -> None:
        """Set the chunk's countdowns, which every later forward pass of it has reset.

        `is_first` marks the first backward of a step. DeepSpeed then replaces the gradients of the modules it ran
        through; later backwards add, so those of other chunks would be added to the last step's.
        """
        # The buffer holds the last step's sums: DeepSpeed overwrites only the slices of modules that the pass reached.
        if is_first and self.optimizer is not None:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        # Modules whose second run ended early did not leave DeepSpeed's stack of running modules. The engine's module,
        # which DeepSpeed puts there at the start, stays.
        del parameter_offload.FWD_MODULE_STACK[1:]
        for module, count in self._countdowns[chunk]:
            module.ds_grads_remaining = count  # type: ignore[assignment]
