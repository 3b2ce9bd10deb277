"""Runs a schedule over one stage's engine: forwards and backwards of the step's micro-batches, and what crosses stages.

A boundary between stages is a named dict of tensors with fixed shapes and dtypes, so nothing is negotiated at run
time. Activations travel on `groups.pipe`, their gradients on `groups.pipe_backward`: each direction has its own
communicator, a send never waits for the other direction, and no schedule here can deadlock. Not here: which
micro-batch a sample is in (`engine.data`), what a stage computes (`engine.models`), gradients and weights (`zero`).

Legend: B micro-batch size, T time, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.parallel.collectives import Work, receive, send
from engine.parallel.groups import Groups
from engine.parallel.schedule import Backward, Forward, Instruction, Schedule, forward_only, instructions
from engine.parallel.zero import StageEngine

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Field:
    """One tensor of a boundary; a gradient comes back for it if `differentiable`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool


Boundary = dict[str, Field]
"""What one stage hands to the next, by the name of the next stage's keyword."""


class Pipeline:
    """One stage of the pipeline; every rank of the world runs one, in step. All methods are collective over the pipe.

    The stage's output is the boundary's one differentiable tensor, or the loss on the last stage; every other
    tensor of the boundary is passed on as it came.
    """

    def __init__(self, engine: StageEngine, groups: Groups, boundary: Boundary, schedule: Schedule) -> None:
        self.engine, self.groups, self.boundary = engine, groups, boundary
        self.schedule: Schedule = schedule
        (self.output_name,) = [name for name, field in boundary.items() if field.differentiable]
        self._live: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
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

    def train(self, inputs: list[Tensors], loss_scale: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one step; returns the sum of the micro-batches' losses (0 unless last stage).

        `inputs` are the stage's own keywords per micro-batch, on the device. The gradient that flows back is that
        of the loss times `loss_scale` (a scalar on the device).
        """
        order = instructions(self.schedule, self.groups.coordinates.stage, self.groups.layout.pipe, len(inputs))
        return self._run(order, inputs, loss_scale)

    @torch.no_grad()
    def evaluate(self, inputs: list[Tensors]) -> torch.Tensor:
        """Forward only; returns the sum of the micro-batches' losses (0 unless last stage)."""
        return self._run(forward_only(len(inputs)), inputs, loss_scale=None)

    def _run(
        self, order: Iterable[Instruction], inputs: list[Tensors], loss_scale: torch.Tensor | None
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.engine.device)
        done = 0
        for instruction in order:
            match instruction:
                case Forward(micro_batch=micro_batch):
                    output = self._forward(micro_batch, inputs[micro_batch], keep=loss_scale is not None)
                    if self.groups.is_last_stage:
                        total += output.detach()
                case Backward(micro_batch=micro_batch):
                    assert loss_scale is not None
                    done += 1
                    self._backward(micro_batch, loss_scale, is_last=done == len(inputs))
        while self._sent:
            self._sent.popleft()[0].wait()
        return total

    def _forward(self, micro_batch: int, own: Tensors, keep: bool) -> torch.Tensor:
        received = {} if self.groups.is_first_stage else self._receive_input()
        hidden = received.get(self.output_name)
        if hidden is not None and keep:
            hidden.requires_grad_(True)
        output = self.engine.forward(**(received | own))
        if not self.groups.is_last_stage:
            passed_on = received | own
            for name in self.boundary:
                self._send(output.detach() if name == self.output_name else passed_on[name], forward=True)
        if keep:
            self._live[micro_batch] = (hidden, output)
        return output

    def _backward(self, micro_batch: int, loss_scale: torch.Tensor, is_last: bool) -> None:
        hidden, output = self._live.pop(micro_batch)
        if self.groups.is_last_stage:
            self.engine.backward(output * loss_scale.to(output.dtype), None, is_last)
        else:
            self.engine.backward(output, self._receive(self.output_name, forward=False), is_last)
        if hidden is not None:
            assert hidden.grad is not None
            self._send(hidden.grad, forward=False)

    def _receive_input(self) -> Tensors:
        return {name: self._receive(name, forward=True) for name in self.boundary}

    def _receive(self, name: str, forward: bool) -> torch.Tensor:
        field = self.boundary[name]
        tensor = torch.empty(field.shape, dtype=field.dtype, device=self.engine.device)
        group = self.groups.pipe if forward else self.groups.pipe_backward
        return receive(tensor, group, group.position + (-1 if forward else 1))

    def _send(self, tensor: torch.Tensor, forward: bool) -> None:
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        group = self.groups.pipe if forward else self.groups.pipe_backward
        tensor = tensor.contiguous()
        self._sent.append((send(tensor, group, group.position + (1 if forward else -1)), tensor))
