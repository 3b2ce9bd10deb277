"""The result of an optimizer step, and the check that its gradient is finite."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.errors import PalimpsestError


class StepResult(NamedTuple):
    """Outcome of an optimizer step; equal on all ranks."""

    updated: bool
    """False where the gradients were discarded, and weights and optimizer state stayed as they were."""
    gradient_norm: float
    """Global norm before clipping."""
    penalties: Mapping[str, float] = MappingProxyType({})
    """Penalties by name, at the weights before the update, over the whole model."""


class NotFinite(PalimpsestError):
    """The gradient is infinite or not a number; the weights are as before the step, on every rank."""


def accept_finite(norm: float) -> bool:
    """Accept every finite gradient norm.

    Raises:
        NotFinite: the norm is infinite or not a number.
    """
    if not math.isfinite(norm):
        raise NotFinite(
            f"the gradient norm is {norm}",
            "a finite number",
            "resume from the last checkpoint with a lower optimizer.learning_rate, or look at the batch's data",
        )
    return True
