"""Runs a schedule over one stage's engine: forwards and backwards of the step's micro-batches, and what crosses stages.

Activations travel on `groups.pipe`, their gradients on `groups.pipe_backward`: each direction has its own
communicator, a send never waits for the other direction, and no schedule here can deadlock. Not here: which
micro-batch a sample is in (`engine.data`), what a stage computes (`engine.models`), gradients and weights (`zero`).

Legend: L losses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from engine.parallel.boundary import Boundary, Field, Tensors, differentiable
from engine.parallel.collectives import Work, receive, send
from engine.parallel.groups import Groups
from engine.parallel.schedule import Backward, Forward, Instruction, Schedule, forward_only, instructions
from engine.parallel.zero import StageEngine


class Pipeline:
    """One stage of the pipeline; every rank of the world runs one, in step. All methods are collective over the pipe.

    `incoming` is what the stage receives (nothing on the first) and `outgoing` what it sends (nothing on the last,
    which makes the losses). What a stage did not make of `outgoing` it passes on as it came.
    """

    def __init__(
        self,
        engine: StageEngine,
        groups: Groups,
        incoming: Boundary,
        outgoing: Boundary,
        num_losses: int,
        schedule: Schedule,
    ) -> None:
        self.engine, self.groups, self.incoming, self.outgoing = engine, groups, incoming, outgoing
        self.num_losses = num_losses
        self.schedule: Schedule = schedule
        self._live: dict[int, tuple[Tensors, Tensors]] = {}
        self._sent: deque[tuple[Work, torch.Tensor]] = deque()
        self._meet_neighbours()

    def _meet_neighbours(self) -> None:
        """One scalar each way, so that communicators which are made at their first use are not made in mid-schedule."""
        for group, step in ((self.groups.pipe, 1), (self.groups.pipe_backward, -1)):
            scalar = torch.zeros((), device=self.engine.device)
            if 0 <= group.position - step < group.size:
                receive(scalar, group, group.position - step)
            if 0 <= group.position + step < group.size:
                send(scalar, group, group.position + step).wait()

    def train(self, inputs: list[Tensors], loss_scales_L: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one step; returns the micro-batches' summed losses (L,), 0 unless on the last stage.

        `inputs` are the stage's own keywords per micro-batch, on the device. The gradient that flows back is that
        of the losses times `loss_scales_L` (fp32 on the device), added up.
        """
        order = instructions(self.schedule, self.groups.coordinates.stage, self.groups.layout.pipe, len(inputs))
        return self._run(order, inputs, loss_scales_L)

    @torch.no_grad()
    def evaluate(self, inputs: list[Tensors]) -> torch.Tensor:
        """Forward only; returns the micro-batches' summed losses (L,), 0 unless on the last stage."""
        return self._run(forward_only(len(inputs)), inputs, loss_scales_L=None)

    def _run(
        self, order: Iterable[Instruction], inputs: list[Tensors], loss_scales_L: torch.Tensor | None
    ) -> torch.Tensor:
        total_L = torch.zeros(self.num_losses, dtype=torch.float32, device=self.engine.device)
        done = 0
        for instruction in order:
            match instruction:
                case Forward(micro_batch=micro_batch):
                    made = self._forward(micro_batch, inputs[micro_batch], keep=loss_scales_L is not None)
                    if self.groups.is_last_stage:
                        total_L += made["losses_L"].detach()
                case Backward(micro_batch=micro_batch):
                    assert loss_scales_L is not None
                    done += 1
                    self._backward(micro_batch, loss_scales_L, is_last=done == len(inputs))
        while self._sent:
            self._sent.popleft()[0].wait()
        return total_L

    def _forward(self, micro_batch: int, own: Tensors, keep: bool) -> Tensors:
        received = {name: self._receive(field, forward=True) for name, field in self.incoming.items()}
        if keep:
            for name in differentiable(self.incoming):
                received[name].requires_grad_(True)
        made = self.engine.forward(**(received | own))
        handed_on = received | own | made
        for name in self.outgoing:
            self._send(handed_on[name].detach(), forward=True)
        if keep:
            self._live[micro_batch] = (received, made)
        return made

    def _backward(self, micro_batch: int, loss_scales_L: torch.Tensor, is_last: bool) -> None:
        received, made = self._live.pop(micro_batch)
        grads = {name: self._receive(self.outgoing[name], forward=False) for name in differentiable(self.outgoing)}
        if self.groups.is_last_stage:
            grads = {"losses_L": loss_scales_L.to(torch.float32).expand(self.num_losses)}
        self.engine.backward([made[name] for name in grads], list(grads.values()), is_last)
        for name in differentiable(self.incoming):
            grad = received[name].grad
            assert grad is not None, f"{name} took no part in what the stage made"
            self._send(grad, forward=False)

    def _receive(self, field: Field, forward: bool) -> torch.Tensor:
        tensor = torch.empty(field.shape, dtype=field.dtype, device=self.engine.device)
        group = self.groups.pipe if forward else self.groups.pipe_backward
        return receive(tensor, group, group.position + (-1 if forward else 1))

    def _send(self, tensor: torch.Tensor, forward: bool) -> None:
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        group = self.groups.pipe if forward else self.groups.pipe_backward
        tensor = tensor.contiguous()
        self._sent.append((send(tensor, group, group.position + (1 if forward else -1)), tensor))
