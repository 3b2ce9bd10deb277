"""Gradients made whole over the axes that ZeRO knows nothing of: tensor ranks and pipeline stages; and their norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Groups
from engine.parallel.state import ParameterGroup
from engine.parallel.zero.optimizers import Shards


class WholeGradients:
    """The gradients that a stage's shards hold when the data ranks have reduced them, once per step."""

    def __init__(
        self,
        shards: Shards,
        parameter_groups: Sequence[ParameterGroup],
        groups: Groups,
        zero_stage: int,
        device: torch.device,
    ) -> None:
        self._shards, self._parameter_groups, self._groups = shards, parameter_groups, groups
        self._zero_stage, self._device = zero_stage, device

    def complete(self) -> torch.Tensor:
        """Adds up, in place, what ranks found of one gradient between them; returns the norm of the whole model's
        gradient (scalar, fp32). Collective over the world."""
        self._sum_partial()
        self._sum_tied()
        return self._norm()

    def _sum_partial(self) -> None:
        """Adds up what the tensor ranks found of the gradients of which each finds a part. Collective over tensor."""
        found = self._shards.gradients()
        parts = [grad for index, grad in found if self._parameter_groups[index].partial and grad.numel()]
        if parts:
            whole = all_reduce(torch.cat([part.view(-1) for part in parts]), self._groups.tensor)
            for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.view(-1).copy_(total)

    def _sum_tied(self) -> None:
        """A tied weight's gradient is the sum of what its stages found. Collective over each of `groups.ties`.

        Groups of parameters stand in one order on all stages, so that no two of these collectives wait crosswise.
        """
        for index, grad in sorted(self._shards.gradients(), key=lambda held: held[0]):
            if stages := self._parameter_groups[index].tied:
                all_reduce(grad, self._groups.ties[stages])

    def _norm(self) -> torch.Tensor:
        """L2 norm of the whole model's gradient, each element counted once. Collective over the world."""
        counted = [grad for index, grad in self._shards.gradients() if self._counts(self._parameter_groups[index])]
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        if counted:
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in counted]
            squares += torch.stack(norms).double().square().sum()
        return all_reduce(squares, self._groups.world).sqrt().float()

    def _counts(self, group: ParameterGroup) -> bool:
        """Whether this rank's gradients of a group are its own, and not a copy that another rank counts."""
        if group.tied and self._groups.coordinates.stage != group.tied[0]:
            return False
        if group.replicated and self._groups.tensor.position > 0:
            return False
        return self._zero_stage > 0 or self._groups.zero.position == 0
