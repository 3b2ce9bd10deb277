"""Execution of a schedule on one stage's engine: passes of a step's micro-batches, and messages between stages.

Activations travel on `groups.pipe`, their gradients on `groups.pipe_backward`, and messages between the last stage and
the first on two groups more: each direction has its own communicator, a send never waits for another direction, and no
schedule here can deadlock. Not here: which micro-batch a sample is in (`engine.data`), what a chunk computes
(`engine.models`), gradients and weights (`zero`).

Legend: B batch, L losses, K domains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from engine.parallel.boundary import DOMAINS, LOGITS, ROW_LOSSES, Field, Tensors, differentiable
from engine.parallel.collectives import Work, receive, send
from engine.parallel.deferral import DeferredGradients
from engine.parallel.groups import Group, Groups
from engine.parallel.schedule import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Schedule,
    forward_only,
    instructions,
)
from engine.parallel.stage import PipelineStageSpec
from engine.parallel.zero import StageEngine


class DomainSums:
    """Losses of the rows of each domain, added up over the micro-batches of a pass: `total_KL`, fp64, K domains.

    All 0 unless on the last stage. The domain of each row is in the micro-batch's `domains_B` (int64).
    """

    def __init__(self, num_domains: int, num_losses: int, device: torch.device) -> None:
        self.total_KL = torch.zeros(num_domains, num_losses, dtype=torch.float64, device=device)

    def add(self, domains_B: torch.Tensor, losses_BL: torch.Tensor) -> None:
        """Add the losses of a micro-batch's rows."""
        # (B, K, 1) x (B, 1, L) -> (B, K, L) -> (K, L). Not `index_add_`, whose order of sums on a GPU is not fixed.
        of_BK1 = F.one_hot(domains_B, len(self.total_KL)).double().unsqueeze(2)
        self.total_KL += (of_BK1 * losses_BL.double().unsqueeze(1)).sum(0)


class Pipeline:
    """One stage of the pipeline; every rank of the world runs one, in step. Methods are collective over the pipe."""

    def __init__(self, engine: StageEngine, groups: Groups, spec: PipelineStageSpec, schedule: Schedule) -> None:
        self.engine, self.groups = engine, groups
        self.spec = spec
        """Specification during the present run stage; the caller replaces it at the beginning of each."""
        self.num_losses = len(spec.losses)
        self.schedule: Schedule = schedule
        self.sizes = (groups.layout.pipe, len(spec.ports))
        """Number of stages, and of chunks of each."""
        # By (chunk, micro-batch): tensors received and returned by forward passes whose backward is yet to come.
        self._live: dict[tuple[int, int], tuple[Tensors, Tensors]] = {}
        self._deferred: dict[tuple[int, int], DeferredGradients] = {}
        # A tensor must live until its send is complete, even if nothing else refers to it.
        self._sent: deque[tuple[Work, torch.Tensor]] = deque()
        self._meet_neighbours()

    def _meet_neighbours(self) -> None:
        """Send one scalar each way, so that communicators which are made at their first use exist before the schedule.

        NCCL makes them in a rendezvous of both sides; in mid-schedule the two could be in different places.
        """
        groups, scalar = self.groups, torch.zeros((), device=self.engine.device)
        # Along each line one after the other: a stage sends on when it has received, and the first in line just sends.
        for group, step in ((groups.pipe, 1), (groups.pipe_backward, -1)):
            if 0 <= group.position - step < group.size:
                receive(scalar, group, group.position - step)
            if 0 <= group.position + step < group.size:
                send(scalar, group, group.position + step).wait()
        if len(self.spec.ports) > 1 and groups.is_last_stage:
            send(scalar, groups.wrap, 0).wait()
            receive(scalar, groups.wrap_backward, 0)
        elif len(self.spec.ports) > 1 and groups.is_first_stage:
            receive(scalar, groups.wrap, groups.wrap.size - 1)
            send(scalar, groups.wrap_backward, groups.wrap.size - 1).wait()

    def train(
        self,
        inputs: list[Tensors],
        loss_scales_L: torch.Tensor,
        by_domain: DomainSums | None = None,
        goes_on: bool = False,
    ) -> torch.Tensor:
        """Run all passes of one step; return the micro-batches' summed losses (L,), 0 unless on the last stage.

        With `goes_on` the step goes on with further passes, whose gradients are added to those of these.
        `inputs` are the keywords of the stage's chunks per micro-batch, on the device. The gradient that flows back is
        that of the sum of losses times `loss_scales_L` (fp32 on the device). The losses of each domain are added to
        `by_domain`, where it is given.
        """
        order = instructions(self.schedule, self.groups.coordinates.stage, *self.sizes, len(inputs))
        return self._run(order, inputs, loss_scales_L, by_domain, goes_on=goes_on)

    @torch.no_grad()
    def evaluate(
        self, inputs: list[Tensors], by_domain: DomainSums | None = None, logits: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Run forward passes only; return the micro-batches' summed losses (L,), 0 unless on the last stage.

        `by_domain` as in `train`. The logits of each micro-batch, of a task's head on the last stage, are added to
        `logits`, where it is given.
        """
        total_L = self._run(forward_only(*self.sizes, len(inputs)), inputs, None, by_domain, logits)
        self.engine.free_weights()
        return total_L

    def _run(
        self,
        order: Iterable[Instruction],
        inputs: list[Tensors],
        loss_scales_L: torch.Tensor | None,
        by_domain: DomainSums | None,
        logits: list[torch.Tensor] | None = None,
        goes_on: bool = False,
    ) -> torch.Tensor:
        total_L = torch.zeros(self.num_losses, dtype=torch.float32, device=self.engine.device)
        # Passes that still add to gradients. The engine reduces in the last one, whatever chunk and micro-batch it is.
        left = len(inputs) * sum(map(self._flows_back, range(len(self.spec.ports)))) + goes_on
        for instruction in order:
            if not (isinstance(instruction, Forward) or self._flows_back(instruction.chunk)):
                continue
            match instruction:
                case Forward(chunk=chunk, micro_batch=micro_batch):
                    train, by_row = loss_scales_L is not None, by_domain is not None
                    made = self._forward(chunk, micro_batch, inputs[micro_batch], train, by_row)
                    if not self.spec.ports[chunk].outgoing:
                        total_L += made["losses_L"].detach()
                        if by_domain is not None:
                            by_domain.add(inputs[micro_batch][DOMAINS], made[ROW_LOSSES])
                        if logits is not None:
                            logits.append(made[LOGITS])
                case Backward(chunk=chunk, micro_batch=micro_batch):
                    left -= 1
                    self._backward(chunk, micro_batch, loss_scales_L, is_last=left == 0)
                case BackwardInput(chunk=chunk, micro_batch=micro_batch):
                    self._backward(chunk, micro_batch, loss_scales_L, is_last=None)
                case BackwardWeight(chunk=chunk, micro_batch=micro_batch):
                    left -= 1
                    self.engine.backward_weight(self._deferred.pop((chunk, micro_batch)), is_last=left == 0)
        while self._sent:  # no tensor outlives its step
            self._sent.popleft()[0].wait()
        return total_L

    def _flows_back(self, chunk: int) -> bool:
        """Return True if the chunk has a backward pass: something in it or in front of it is trained."""
        ports = self.spec.ports[chunk]
        return not ports.outgoing or bool(differentiable(ports.outgoing))

    def _forward(self, chunk: int, micro_batch: int, inputs: Tensors, train: bool, by_row: bool) -> Tensors:
        ports, keep = self.spec.ports[chunk], train and self._flows_back(chunk)
        asked: dict[str, Any] = {"by_row": True} if by_row and not ports.outgoing else {}
        own = {name: tensor for name, tensor in inputs.items() if name in ports.inputs}
        received = {
            name: self._receive(field, forward=True)
            for name, field in ports.incoming.items()
            if train or field.evaluated
        }
        if keep:
            # Leaves of this stage's graph: their `.grad` is what the stage before receives.
            for name in differentiable(ports.incoming):
                received[name].requires_grad_(True)
        with torch.set_grad_enabled(keep):
            made = self.engine.forward(chunk, received | own | asked)
        # What the chunk did not return is passed on as it came, such as document numbers.
        handed_on = received | own | made
        for name, field in ports.outgoing.items():
            if train or field.evaluated:
                self._send(handed_on[name].detach(), forward=True)
        if keep:
            self._live[chunk, micro_batch] = (received, made)
        return made

    def _backward(self, chunk: int, micro_batch: int, loss_scales_L: torch.Tensor | None, is_last: bool | None) -> None:
        """Run a whole backward pass, or with `is_last` None the part of it that the stage before waits for."""
        assert loss_scales_L is not None
        ports = self.spec.ports[chunk]
        received, made = self._live.pop((chunk, micro_batch))
        grads = {name: self._receive(ports.outgoing[name], forward=False) for name in differentiable(ports.outgoing)}
        if not ports.outgoing:  # the last chunk: the backward pass starts from its losses
            grads = {"losses_L": loss_scales_L.to(torch.float32).expand(self.num_losses)}
        from_outputs = (chunk, [made[name] for name in grads], list(grads.values()))
        if is_last is None:
            self._deferred[chunk, micro_batch] = self.engine.backward_input(*from_outputs)
        else:
            self.engine.backward(*from_outputs, is_last)
        for name in differentiable(ports.incoming):
            grad = received[name].grad
            assert grad is not None, f"{name} took no part in what the stage made"
            self._send(grad, forward=False)

    def _receive(self, field: Field, forward: bool) -> torch.Tensor:
        tensor = torch.empty(field.shape, dtype=field.dtype, device=self.engine.device)
        group = self._link(forward, ahead=not forward)
        return receive(tensor, group, (group.position + (-1 if forward else 1)) % group.size)

    def _send(self, tensor: torch.Tensor, forward: bool) -> None:
        # Drop complete sends from the oldest on, which frees their tensors; never wait here.
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        group = self._link(forward, ahead=forward)
        tensor = tensor.contiguous()
        position = (group.position + (1 if forward else -1)) % group.size
        self._sent.append((send(tensor, group, position), tensor))

    def _link(self, forward: bool, ahead: bool) -> Group:
        """Return the group of messages in one direction between this stage and the one `ahead` of it, or behind it."""
        # The stage ahead of the last one is the first, and the one behind the first is the last.
        groups = self.groups
        if groups.is_last_stage if ahead else groups.is_first_stage:
            return groups.wrap if forward else groups.wrap_backward
        return groups.pipe if forward else groups.pipe_backward
