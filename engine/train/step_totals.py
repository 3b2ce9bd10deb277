"""Sums of one step over all ranks: the weight of its targets, its losses, and the flags of each rank.

Legend: L losses, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.errors import DataError, PalimpsestError
from engine.parallel.boundary import Tensors
from engine.parallel.collectives import all_reduce, first_error
from engine.parallel.groups import Groups
from engine.parallel.pipeline import DomainSums
from engine.train.metrics import Record


class Sums:
    """Sums over the world, equal on every rank. The L losses are in the order of `names`; the sums of the K domains
    travel in the same collectives."""

    def __init__(self, names: tuple[str, ...], groups: Groups, device: torch.device) -> None:
        self.names, self.groups, self.device = names, groups, device

    def of_weights(
        self, read: Callable[[], tuple[list[Tensors], list[float]]], num_domains: int = 0
    ) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
        """Return this rank's inputs, and the weight of all targets by loss (L, fp64) and by domain and loss (K, L).

        `read` returns this rank's inputs and its own weights, (L + K * L). Collective over the world.

        Raises:
            PalimpsestError: the error of a rank that could not read its share, on every rank.
        """
        num_losses = len(self.names)
        size = num_losses * (1 + num_domains)
        inputs, counted, error = [], [0.0] * size, None
        try:
            inputs, own = read()
            # Ranks of one pipeline, of the tensor and of the sequence axis read the same rows: one of them counts.
            if self.groups.is_last_stage and self.groups.tensor.position == self.groups.sequence.position == 0:
                counted = own
        except PalimpsestError as problem:
            # NaN survives any sum, so all ranks hear of it without another collective.
            counted, error = [math.nan] * size, problem
        weights = all_reduce(torch.tensor(counted, dtype=torch.float64, device=self.device), self.groups.world)
        if math.isnan(weights[0].item()):
            failed = first_error(error, self.groups.world)
            raise failed if failed is not None else DataError("the weights of this step's targets are not numbers")
        return inputs, weights[:num_losses], weights[num_losses:].view(num_domains, num_losses)

    def by_domain(self, num_domains: int) -> DomainSums | None:
        """Return the sums that a pass adds the losses of each domain to; None where they are not told apart."""
        return DomainSums(num_domains, len(self.names), self.device) if num_domains else None

    def of_losses(
        self, sums_L: torch.Tensor, flags: tuple[float, ...] = (), by_domain: DomainSums | None = None
    ) -> tuple[list[float], list[float], torch.Tensor]:
        """Return the sums over ranks of the last stages' losses, of the flags, and of the losses by domain (K, L).
        Collective over the world."""
        # Tensor ranks hold the same loss. Ranks of the sequence axis do not: each has that of its own slice.
        counted = float(self.groups.tensor.position == 0)  # the losses are 0 on all stages but the last
        told = torch.tensor(flags, dtype=torch.float64, device=self.device)
        # One all-reduce for everything: losses (L), flags, losses by domain (K * L).
        own = [sums_L.double() * counted, told]
        if by_domain is not None:
            own.append(by_domain.total_KL.flatten() * counted)
        totals = all_reduce(torch.cat(own), self.groups.world)
        losses, (begin, end) = totals[: len(self.names)], (len(self.names), len(self.names) + len(flags))
        return losses.tolist(), totals[begin:end].tolist(), totals[end:].view(-1, len(self.names))

    @staticmethod
    def scales(weights_L: torch.Tensor) -> torch.Tensor:
        """Return the factors of the sums of the losses (L, fp64): 1 / weight, and 0 for a loss without targets.

        The scales are rounded to fp32 and multiplied by a number of ranks later on. The reciprocal of a number close
        to 0 would overflow there, and infinity times the loss, which is 0, is NaN.
        """
        return torch.where(weights_L > 0, 1.0 / weights_L, 0.0)

    def record(self, losses: list[float], what: str) -> Record:
        """Return the sum of the losses as `what`, and each under its own name where there are several."""
        found: Record = {what: sum(losses)}
        if len(losses) > 1:
            found |= {f"{name}_{what}": loss for name, loss in zip(self.names, losses, strict=True)}
        return found

    def record_domains(
        self, names: tuple[str, ...], sums_KL: torch.Tensor, weights_KL: torch.Tensor, what: str
    ) -> Record:
        """Return the losses of each domain as `WHAT/NAME`, over its own targets; no entry for one without targets."""
        found: Record = {}
        for name, sums, weights in zip(names, sums_KL.tolist(), weights_KL.tolist(), strict=True):
            if any(weights):
                found |= self.record(means(sums, weights), f"{what}/{name}")
        return found


def means(sums: list[float], weights: list[float]) -> list[float]:
    """Return the mean of each loss over its targets; 0 where it has none."""
    return [loss / weight if weight else 0.0 for loss, weight in zip(sums, weights, strict=True)]
