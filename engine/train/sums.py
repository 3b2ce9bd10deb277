"""What the ranks of a run know together of a step: the weight of its targets, its losses, and what each has to tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.errors import DataError, PalimpsestError
from engine.parallel.boundary import Tensors
from engine.parallel.collectives import all_reduce, first_error
from engine.parallel.groups import Groups
from engine.train.metrics import Record


class Sums:
    """Sums over the world, equal on every rank. Losses are L, in the order of `names`."""

    def __init__(self, names: tuple[str, ...], groups: Groups, device: torch.device) -> None:
        self.names, self.groups, self.device = names, groups, device

    def of_weights(self, read: Callable[[], tuple[list[Tensors], list[float]]]) -> tuple[list[Tensors], torch.Tensor]:
        """This rank's inputs, and the weight of all ranks' targets by loss (L, fp64). Collective over the world.

        Raises:
            PalimpsestError: what a rank met that could not read its share, on every rank.
        """
        inputs, counted, error = [], [0.0] * len(self.names), None
        try:
            inputs, own = read()
            if self.groups.is_last_stage and self.groups.tensor.position == self.groups.sequence.position == 0:
                counted = own
        except PalimpsestError as problem:
            counted, error = [math.nan] * len(self.names), problem  # travels with the sum: no collective more
        weights_L = all_reduce(torch.tensor(counted, dtype=torch.float64, device=self.device), self.groups.world)
        if math.isnan(weights_L[0].item()):
            failed = first_error(error, self.groups.world)
            raise failed if failed is not None else DataError("the weights of this step's targets are not numbers")
        return inputs, weights_L

    def of_losses(self, sums_L: torch.Tensor, flags: tuple[float, ...] = ()) -> tuple[list[float], list[float]]:
        """Sums over ranks: of the last stages' losses, and of what each rank has to tell. Collective over the world."""
        counted = float(self.groups.tensor.position == 0)  # the losses are 0 on all stages but the last
        told = torch.tensor(flags, dtype=torch.float64, device=self.device)
        totals = all_reduce(torch.cat((sums_L.double() * counted, told)), self.groups.world).tolist()
        return totals[: len(self.names)], totals[len(self.names) :]

    @staticmethod
    def scales(weights_L: torch.Tensor) -> torch.Tensor:
        """Return what the sums of the losses are multiplied by (L, fp64): 1 / weight, and 0 for a loss without targets.

        The scales are rounded to fp32 and multiplied by a number of ranks later on. The reciprocal of a number close
        to 0 would overflow there, and infinity times the loss, which is 0, is NaN.
        """
        return torch.where(weights_L > 0, 1.0 / weights_L, 0.0)

    def record(self, losses: list[float], what: str) -> Record:
        """The sum of the losses as `what`, and each under its own name where there are several."""
        found: Record = {what: sum(losses)}
        if len(losses) > 1:
            found |= {f"{name}_{what}": loss for name, loss in zip(self.names, losses, strict=True)}
        return found
