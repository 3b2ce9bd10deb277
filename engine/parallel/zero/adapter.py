"""Inputs that DeepSpeed needs: an initialised process, process groups, an engine with one kind of ZeRO optimizer, and a
scalar from which a backward pass starts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import ZERO_OPTIMIZATION

from engine.parallel.groups import Groups


def start(device: torch.device) -> None:
    """Initialise DeepSpeed in this process, after `groups.connect`; build no extension on a CPU.

    DeepSpeed would compile a shared-memory collective there (minutes, and a lock that a killed build leaves behind);
    gloo does without.
    """
    if device.type == "cpu":
        # DeepSpeed compiles the operation only if this table says that the machine supports it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch 2.13 renames collectives that DeepSpeed calls; each rank would say so several times
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")


class Topology:
    """The `mpu` object of DeepSpeed, with the methods that it calls. Every axis but data is one "model" axis to it."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    # Data x sequence, not data alone: ranks of the sequence axis hold equal weights too, so ZeRO shards over both.
    def get_data_parallel_group(self) -> Any:
        return self.groups.zero.handle

    def get_data_parallel_rank(self) -> int:
        return self.groups.zero.position

    def get_data_parallel_world_size(self) -> int:
        return self.groups.zero.size

    def get_model_parallel_group(self) -> Any:
        return self.groups.model.handle

    def get_model_parallel_rank(self) -> int:
        return self.groups.model.position

    def get_model_parallel_world_size(self) -> int:
        return self.groups.model.size


class Engine(deepspeed.DeepSpeedEngine):
    """DeepSpeed's engine, with one ZeRO optimizer for stages 1 and 2.

    For ZeRO-1 with bf16 weights and fp32 gradients DeepSpeed takes another wrapper, whose state lies otherwise and
    whose gradient norm knows nothing of pipeline stages; the ZeRO optimizer accumulates in fp32 just as well.
    """

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        # Called although its answer is dropped under ZeRO: it also checks that ZeRO supports the optimizer.
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION if self.zero_optimization() else wrapper


def scalar_of(outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a scalar whose backward pass gives each of the `outputs` its gradient, for DeepSpeed's `backward`."""
    return _Emit.apply(grads, *outputs)  # type: ignore[return-value]


class _Emit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        # Its value is never read: 0 cannot overflow, whatever the dtype of the outputs.
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # The scalar's own gradient (DeepSpeed's loss scale, 1 in fp32 and bf16) is ignored: `grads` are final.
        return None, *ctx.grads
