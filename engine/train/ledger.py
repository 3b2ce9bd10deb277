"""Measures of what a run of stages has learned and forgotten, from its loss matrix. Pure arithmetic.

`R[t][k]` is the held-out loss (nats per token, smaller is better) of domain k at the end of stage t. A domain belongs
to the stage that brought it, its home. The measures are those of Lopez-Paz and Ranzato 2017 (Gradient Episodic Memory
for Continual Learning, section 2) and, of forgetting, Chaudhry et al. 2018 (Riemannian Walk for Incremental Learning),
with the signs turned for losses: transfer is positive where the loss falls, forgetting where it rises. A measure that
lacks a number is None: no evaluation was made there.

Legend: T stages, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

Loss = float | None


@dataclass(frozen=True)
class LossMatrix:
    """Held-out losses of every domain at the end of every stage."""

    stages: tuple[str, ...]
    domains: tuple[str, ...]
    homes: tuple[int, ...]
    """Number of the stage that brought each domain, (K,)."""
    losses: tuple[tuple[Loss, ...], ...]
    """R, (T, K)."""
    first: tuple[Loss, ...] = ()
    """Loss of each domain with the initial weights, before the first stage, (K,); empty where none was measured."""

    def before(self, stage: int, domain: int) -> Loss:
        """Return the loss of a domain at the beginning of a stage."""
        if stage > 0:
            return self.losses[stage - 1][domain]
        return self.first[domain] if self.first else None

    def seen(self, stage: int) -> list[int]:
        """Return the domains that stages up to `stage` have brought."""
        return [domain for domain, home in enumerate(self.homes) if home <= stage]

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.stages) - 1


@dataclass(frozen=True)
class DomainMeasures:
    """Measures of one domain at the end of the last stage, in nats per token."""

    domain: str
    home: str
    """Name of the stage that brought it."""
    loss: Loss
    loss_at_home: Loss
    """Loss at the end of its own stage."""
    gain: Loss
    """Fall of the loss over its own stage: what was learned of it there."""
    forgetting_from_first: Loss
    """Rise of the loss since the end of its own stage; below 0 where later stages have helped."""
    forgetting_from_best: Loss
    """Rise of the loss since the best stage's end, its own or a later one; never below 0."""
    forward_transfer: Loss
    """Fall of the loss over the stages before its own, from the initial weights; None for domains of the first one."""


def measure(matrix: LossMatrix) -> list[DomainMeasures]:
    """Return the measures of every domain that has been brought."""
    return [_domain(matrix, domain) for domain in matrix.seen(matrix.last)]


def _domain(matrix: LossMatrix, domain: int) -> DomainMeasures:
    home = matrix.homes[domain]
    now, at_home = matrix.losses[matrix.last][domain], matrix.losses[home][domain]
    since = [row[domain] for row in matrix.losses[home:]]
    best = min((loss for loss in since if loss is not None), default=None)
    start = matrix.first[domain] if matrix.first else None
    return DomainMeasures(
        domain=matrix.domains[domain],
        home=matrix.stages[home],
        loss=now,
        loss_at_home=at_home,
        gain=fall(matrix.before(home, domain), at_home),
        forgetting_from_first=fall(now, at_home),
        forgetting_from_best=fall(now, best),
        forward_transfer=fall(start, matrix.before(home, domain)) if home > 0 else None,
    )


def average(matrix: LossMatrix, stage: int | None = None) -> Loss:
    """Return the mean loss of the domains seen until a stage (default: the last), at its end."""
    stage = matrix.last if stage is None else stage
    return mean(matrix.losses[stage][domain] for domain in matrix.seen(stage))


def backward_transfer(matrix: LossMatrix) -> Loss:
    """Return the mean fall of the loss of the domains of earlier stages since the ends of those stages."""
    old = matrix.seen(matrix.last - 1)
    return mean(fall(matrix.losses[matrix.homes[k]][k], matrix.losses[matrix.last][k]) for k in old)


def forward_transfer(matrix: LossMatrix) -> Loss:
    """Return the mean fall of the loss of later stages' domains over the stages before them."""
    later = [domain for domain in matrix.seen(matrix.last) if matrix.homes[domain] > 0]
    return mean(_domain(matrix, domain).forward_transfer for domain in later)


def forgetting(matrix: LossMatrix, from_best: bool = False) -> Loss:
    """Return the mean forgetting of the domains of earlier stages."""
    old = [_domain(matrix, domain) for domain in matrix.seen(matrix.last - 1)]
    return mean(one.forgetting_from_best if from_best else one.forgetting_from_first for one in old)


def recovered_share(forgotten: Loss, forgotten_without: Loss) -> Loss:
    """Return the share of a reference run's forgetting that a run has spared: 1 none is left, 0 nothing was spared.

    None where the reference has forgotten nothing.
    """
    if forgotten is None or forgotten_without is None or forgotten_without <= 0:
        return None
    return 1 - forgotten / forgotten_without


def cost(loss: Loss, loss_without: Loss) -> Loss:
    """Return the relative rise of a loss over that of a reference run: 0.01 is 1 % worse."""
    if loss is None or loss_without is None or loss_without == 0:
        return None
    return loss / loss_without - 1


def bits_per_byte(loss: Loss, tokens: int, num_bytes: int) -> Loss:
    """Return a loss in bits per byte of text, for a set of so many tokens and bytes; None without a byte count."""
    return None if loss is None or not num_bytes else loss / math.log(2) * tokens / num_bytes


def fall(before: Loss, after: Loss) -> Loss:
    """Return the fall from one loss to another, below 0 where it rises."""
    return None if before is None or after is None else before - after


def mean(losses: Iterable[Loss]) -> Loss:
    """Return the mean; None where a number is missing, or there is none."""
    found: Sequence[Loss] = list(losses)
    known = [loss for loss in found if loss is not None]
    return fmean(known) if known and len(known) == len(found) else None
