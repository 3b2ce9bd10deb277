"""Sums of gradients over the axes that ZeRO does not know (tensor ranks and pipeline stages), and their global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from engine.parallel.collectives import all_reduce
from engine.parallel.groups import Groups
from engine.parallel.state import ParameterGroup, ParameterShard
from engine.parallel.zero.optimizers import Shards
from engine.parallel.zero.penalties import Penalty, add_penalties

GradientEdit = Callable[[ParameterShard, torch.Tensor], object]
"""Function that changes the gradient of a trained shard in place."""


class WholeGradients:
    """Completes the gradients that a stage's shards hold once the data ranks have reduced them, once per step."""

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

    def complete(
        self, penalties: Sequence[Penalty] = (), edit: GradientEdit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum partial and tied gradients over their ranks in place, let `edit` change them, and add the penalties'
        gradients to them.

        Return the norm of the whole model's gradient, a scalar in fp32, and each penalty over the whole model,
        (penalties,) in fp64. Collective over the world.
        """
        self._sum_partial()
        self._sum_tied()
        if edit is not None:
            for shard, gradient, _ in self._counted_shards():
                edit(shard, gradient)
        values = add_penalties(penalties, self._counted_shards() if penalties else (), self._device)
        return self._norm(values)

    def _counted_shards(self) -> Iterator[tuple[ParameterShard, torch.Tensor, bool]]:
        """Yield each trained shard with its gradient, and True where no other rank counts the shard."""
        counted = {spec.name: self._counts(group) for group in self._parameter_groups for spec in group.specs}
        pairs = zip(self._shards.parameter_shards(), self._shards.gradient_shards(), strict=True)
        for shard, (spec, start, gradient) in pairs:
            assert (shard.spec.name, shard.start) == (spec.name, start), "weights and gradients have one order"
            yield shard, gradient, counted[spec.name]

    def _sum_partial(self) -> None:
        """Sum partial gradients (see `ParameterGroup.partial`) over the tensor group. Collective over `tensor`."""
        found = self._shards.gradients()
        parts = [grad for index, grad in found if self._parameter_groups[index].partial and grad.numel()]
        if parts:
            # One collective for all of them: most are norms and biases, each of which alone would be mostly latency.
            whole = all_reduce(torch.cat([part.view(-1) for part in parts]), self._groups.tensor)
            for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.view(-1).copy_(total)

    def _sum_tied(self) -> None:
        """Sum the gradient of each tied weight over its stages. Collective over each of `groups.ties`.

        Parameter groups have the same order on all stages, so that no two of these collectives deadlock.
        """
        for index, grad in sorted(self._shards.gradients(), key=lambda held: held[0]):
            if stages := self._parameter_groups[index].tied:
                all_reduce(grad, self._groups.ties[stages])

    def _norm(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the L2 norm of the whole model's gradient, each element counted once, and the sums of `values` over
        the ranks. Collective over the world."""
        counted = [grad for index, grad in self._shards.gradients() if self._counts(self._parameter_groups[index])]
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        if counted:
            # fp32 within a tensor, fp64 across tensors and ranks: the sum hardly depends on how ranks cut the model.
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in counted]
            squares += torch.stack(norms).double().square().sum()
        # one collective for all of them
        sums = all_reduce(torch.cat((squares.view(1), values)), self._groups.world)
        return sums[0].sqrt().float(), sums[1:]

    def _counts(self, group: ParameterGroup) -> bool:
        """Return True if this rank's gradients of a group are its own, and not a copy that another rank counts."""
        if group.tied and self._groups.coordinates.stage != group.tied[0]:
            return False
        if group.replicated and self._groups.tensor.position > 0:
            return False
        # ZeRO-1 to 3 cut gradients over the data ranks, ZeRO-0 leaves each of them a copy.
        return self._zero_stage > 0 or self._groups.zero.position == 0
