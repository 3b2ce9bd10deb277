"""One DeepSpeed engine per pipeline stage, driven one micro-batch at a time: the adapter between schedule and ZeRO.

DeepSpeed's own `PipelineEngine` refuses ZeRO-2 and 3. Here each rank gives its stage to an engine of its own, ZeRO
runs over the stage's data ranks, and `engine.parallel.pipeline` decides which micro-batch goes forward or backward.
DeepSpeed's behaviour that is wrong in this use is corrected here (gradients of a backward that follows a backward, and
of one that starts from a received gradient), in `gradient_norm` (the norm, tied embeddings on two stages) and in
`stage3`.
Gradients are averaged over data ranks by DeepSpeed; the caller's loss scale undoes it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from torch import nn

from engine.config.schema.parallel import ParallelConfig
from engine.parallel.boundary import Tensors
from engine.parallel.deferral import Deferral, DeferredGradients, weight_gradients
from engine.parallel.distillation import DistilledLosses
from engine.parallel.groups import Group, Groups
from engine.parallel.stage import StageModule
from engine.parallel.state import ParameterGroup
from engine.parallel.zero.accumulator import Accumulator
from engine.parallel.zero.adapter import Topology, scalar_of
from engine.parallel.zero.construction import (
    MakeOptimizer,
    ShardOptimizer,
    adapt_config,
    make_deepspeed_engine,
    mark_frozen,
    optimizer_over,
    parameters_by_group,
    replace_norm,
)
from engine.parallel.zero.frozen import FrozenWeights
from engine.parallel.zero.gathering import Gathering
from engine.parallel.zero.gradient_norm import GradientEdit, WholeGradients
from engine.parallel.zero.held_state import HeldState
from engine.parallel.zero.offload import host_state
from engine.parallel.zero.optimizers import FlatShards, PartitionedShards, has_gradient, shards
from engine.parallel.zero.penalties import Penalty
from engine.parallel.zero.stage3 import (
    DeepSpeedPatches,
    forget_modules,
    offload_of,
    partition_empty,
    replace_parameters,
)
from engine.parallel.zero.step import StepResult, accept_finite


class StageEngine(HeldState):
    """Passes and optimizer step of one pipeline stage under one ZeRO stage. Every rank of the world makes one.

    `module` is the stage on the meta device, already tensor-sharded, and `parameter_groups` covers its parameters by
    logical name, frozen ones among them. Weights are zero until `fill`. A stage that trains nothing has no optimizer,
    and passes gradients on to the stages before it where these train something.
    """

    def __init__(
        self,
        module: StageModule,
        parameter_groups: list[ParameterGroup],
        make_optimizer: MakeOptimizer,
        config: dict[str, Any],
        parallel: ParallelConfig,
        groups: Groups,
        device: torch.device,
    ) -> None:
        self.device = device
        self.penalties: tuple[Penalty, ...] = ()
        """Penalties on the weights that each step adds to the gradient."""
        self.gradient_edit: GradientEdit | None = None
        """Function that changes the gradients of the next step in place, before its penalties are added."""
        self.distilled: DistilledLosses | None = None
        """Loss over the vocabulary that the module computes, where some run stage distils."""
        zero_stage: int = config["zero_optimization"]["stage"]
        self.dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        self.clip_norm: float = config["gradient_clipping"]
        trained = [group for group in parameter_groups if group.trained_since is not None]
        config = adapt_config(config, parallel, trains=bool(trained))
        mark_frozen(module, parameter_groups)
        topology = Topology(groups)
        if zero_stage == 3:
            near = None if groups.near is None else groups.near.handle
            partition_empty(module, self.dtype, device, topology, config, near)
        else:
            replace_parameters(
                module, lambda p: nn.Parameter(torch.zeros(p.shape, dtype=self.dtype, device=device), p.requires_grad)
            )
        named = parameters_by_group(module, trained)
        frozen = [group for group in parameter_groups if group.trained_since is None]
        held = [one for group in parameters_by_group(module, frozen) for one in group]
        assert len(held) + sum(map(len, named)) == len(list(module.parameters())), "a parameter is in no group"
        frozen_weights = FrozenWeights(zero_stage, held, groups.zero)
        optimizer = optimizer_over(named, trained, make_optimizer) if trained else None
        self._engine: Any = make_deepspeed_engine(module, optimizer, topology, config)
        offloaded = parallel.offload == "optimizer" and optimizer is not None
        self._host = host_state(zero_stage, self._engine, device) if offloaded else None
        held_shards = shards(zero_stage, self._engine, optimizer, named, groups.zero.position)
        super().__init__(groups, zero_stage, parameter_groups, named, held_shards, frozen_weights, optimizer)
        if isinstance(optimizer, ShardOptimizer):
            # Under ZeRO-0 every data rank holds whole tensors: there is nobody to exchange shards with.
            zero = groups.zero if zero_stage > 0 else Group((groups.global_rank,), 0)
            optimizer.attach(held_shards.ranges(), self.placements(), zero, groups.tensor)
        self._patches = DeepSpeedPatches(self._engine) if self.zero_stage == 3 else None
        self._gathering = Gathering(self._engine, parallel.gathers_per_step) if self.zero_stage == 3 else None
        self._accumulator = self._make_accumulator(config) if parallel.reduces_per_step else None
        self._deferral = Deferral(module) if parallel.schedule == "zb-h1" else None
        self._whole = WholeGradients(self._shards, trained, groups, self.zero_stage, device)
        self._gradients_begun = False
        self._rate_factors = [1.0] * len(trained)
        self._norm = torch.zeros((), device=device)
        replace_norm(self._engine, bool(trained), self.zero_stage, lambda: self._norm)

    def forward(self, chunk: int, inputs: Tensors) -> Tensors:
        """Run a chunk on one micro-batch; return its outputs by name. Collective over the ZeRO group under ZeRO-3."""
        with self._pass(chunk, backward=False):
            made = self._engine(chunk=chunk, inputs=inputs)
        if self._patches and torch.is_grad_enabled():
            self._patches.after_forward(chunk)
        return made

    def backward(
        self, chunk: int, outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], is_last: bool
    ) -> None:
        """Run the backward pass of a chunk from the gradient of each of its `outputs`. Collective over the ZeRO group.

        `is_last` marks the last backward of a step, after which gradients are reduced.
        """
        if self.optimizer is None:
            self._backward_through(chunk, outputs, grads, is_last)
            return
        # Set explicitly: DeepSpeed would derive the boundary from its own count of micro-steps.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.inside_no_sync_ctxt = self._accumulator is not None  # then DeepSpeed reduces nothing
        if self.zero_stage > 0:
            # DeepSpeed calls this at each forward pass only. Without it a backward that follows a backward counts as
            # the same micro-step, and replaces gradients instead of adding to them.
            self._engine.optimizer.clear_backward_seen_flag()
        if self._patches:
            self._patches.before_backward(chunk, is_first=not self._gradients_begun)
        self._gradients_begun = not is_last
        with self._pass(chunk, backward=True):
            # No division by accumulation steps: the caller's loss scale already holds the whole batch's denominator.
            self._engine.backward(scalar_of(outputs, grads), scale_wrt_gas=False)
        self._engine.inside_no_sync_ctxt = False
        if is_last:
            self._reduce()

    def _backward_through(
        self, chunk: int, outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], is_last: bool
    ) -> None:
        """Run the backward pass of a chunk of a stage that trains nothing, for the sake of its inputs' gradients."""
        if self._patches:
            self._patches.before_backward(chunk, is_first=False)
        with self._pass(chunk, backward=True):
            scalar_of(outputs, grads).backward()
        if is_last:
            self._reduce()

    def backward_input(
        self, chunk: int, outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
    ) -> DeferredGradients:
        """Run `backward` without the gradients of linear layers' weights; return the operands of these gradients.

        For the schedule that splits backward passes. Collective over the ZeRO group.
        """
        assert self._deferral is not None
        self.backward(chunk, outputs, grads, is_last=False)
        return self._deferral.take()

    def backward_weight(self, deferred: DeferredGradients, is_last: bool) -> None:
        """Compute the deferred weight gradients of a backward pass.

        `is_last` marks the last one of a step, after which gradients are reduced: then collective over the ZeRO group.
        """
        for weight, grad in weight_gradients(deferred):
            if self._accumulator:
                self._accumulator.add(weight, grad)
            else:
                weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
        if is_last:
            self._gradients_begun = False
            self._engine.set_gradient_accumulation_boundary(True)
            self._reduce()
            if not self._accumulator and self.optimizer is not None:
                # DeepSpeed reduces in its backward pass, which was over before these gradients existed.
                self._engine.allreduce_gradients()

    @contextlib.contextmanager
    def _pass(self, chunk: int, backward: bool) -> Iterator[None]:
        """Open and close the gathering of weights around a pass of a chunk."""
        if self._gathering:
            self._gathering.begin(chunk, backward)
        yield
        if self._gathering:
            self._gathering.end()

    def _reduce(self) -> None:
        """Free gathered weights and reduce accumulated gradients, after the last gradient of a step."""
        self.free_weights()
        if self._accumulator:
            self._accumulator.reduce()

    def free_weights(self) -> None:
        """Free weights that ZeRO-3 gathered once for many passes (`gather: step`); call after the last of them."""
        if self._gathering:
            self._gathering.free()

    def begin_run_stage(self, number: int) -> None:
        """Take the factors of the learning rate of run stage `number` (from 0)."""
        self._rate_factors = [group.rate_factors[number] if group.rate_factors else 1.0 for group in self._trained]

    def step(self, learning_rate: float, accept: Callable[[float], bool] = accept_finite) -> StepResult:
        """Clip, update the weights and clear the gradients.

        `learning_rate` is that of parameters whose factor is 1.

        Where `accept(norm)` is False (on every rank alike), the gradients are discarded and weights and optimizer
        state stay as they are, bit for bit. Collective over the world.

        Raises:
            NotFinite, or what else `accept` raises: on every rank, before any weight changed.
        """
        if self.optimizer is not None:
            # DeepSpeed's optimizer updates by these very groups.
            for group, factor in zip(self.optimizer.param_groups, self._rate_factors, strict=True):
                group["lr"] = factor * learning_rate
        self._norm, values = self._whole.complete(self.penalties, self.gradient_edit)
        self.gradient_edit = None
        # The host waits for the device here. The norm is equal on all ranks, so all of them accept it or none does.
        norm = self._norm.item()
        accepted = accept(norm)
        if self.optimizer is None:
            if self.zero_stage == 3:  # as DeepSpeed's own step does
                offload_of(self._engine).partition_all_parameters()
        elif not accepted:
            self._discard()
        elif self._host:  # clips while it copies the gradients to the host
            self._host.step(self._clip_factor(), self._engine.step)
        else:
            if self.zero_stage == 0 and (factor := self._clip_factor()) is not None:
                for _, grad in self._shards.gradients():
                    grad.mul_(factor)
            self._engine.step()
        if self._accumulator:
            # After the step: the optimizer's gradients may be views of these buffers.
            self._accumulator.clear()
        names = [penalty.name for penalty in self.penalties]
        return StepResult(accepted, norm, dict(zip(names, values.tolist(), strict=True)))

    def uncleared_gradients(self) -> list[str]:
        """Return the names of the parameters (or of a group's first one) whose gradients were not cleared.

        Call between steps.
        """
        held, parameters = self._accumulator, [one for group in self._named for one in group]
        found = {
            spec.name for spec, parameter in parameters if has_gradient(parameter) or (held and held.holds(parameter))
        }
        found |= {self._trained[index].specs[0].name for index in self._shards.held_gradients()}
        return sorted(found)

    def close(self) -> None:
        """Let go of all tensors, so that another engine can take their place; this one cannot be used any more."""
        if self._accumulator:
            self._accumulator.close()
        for _, parameter in (one for group in self._named for one in group):
            parameter.grad = None
        self._engine.destroy()
        forget_modules()
        self.__dict__.clear()

    def _make_accumulator(self, config: dict[str, Any]) -> Accumulator | None:
        """Make the buffers of `reduce: step`; None under ZeRO-0, where DeepSpeed itself reduces once per step."""
        if not isinstance(self._shards, FlatShards | PartitionedShards):
            return None
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config["data_types"]["grad_accum_dtype"]]
        return Accumulator(self._engine, self._shards, self.groups.zero, dtype)

    def _discard(self) -> None:
        """Clear the gradients of a step that is not taken.

        Under ZeRO by DeepSpeed's own step with a norm of infinity: after an overflow it clears gradients and leaves
        weights and moments alone.
        """
        if self.zero_stage == 0:
            self._engine.zero_grad()
            return
        self._norm = torch.full_like(self._norm, torch.inf)
        optimizer, level = self._engine.optimizer, deepspeed.utils.logger.level
        checked = getattr(optimizer, "check_grad_overflow", None)
        optimizer.check_grad_overflow = True  # ZeRO-1 and 2 with bf16 would not look at the norm
        deepspeed.utils.logger.setLevel(logging.ERROR)  # it would warn of gradients that are not finite
        try:
            self._engine.step()
        finally:
            deepspeed.utils.logger.setLevel(level)
            optimizer.check_grad_overflow = checked
        assert self._engine.optimizer.overflow, "DeepSpeed discards a step whose norm is not finite"

    def _clip_factor(self) -> torch.Tensor | None:
        """Return the factor of clipping, computed as DeepSpeed does; None without clipping."""
        # On the device, without a branch on the norm: 1 where the norm is below the limit. 1e-6 is DeepSpeed's.
        return 1.0 / ((self._norm + 1e-6) / self.clip_norm).clamp(min=1.0) if self.clip_norm > 0 else None
