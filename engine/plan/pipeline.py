"""What a pipeline schedule costs: idle time, and micro-batches alive at once. 1F1B and GPipe."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal


def bubble(pipe: int, num_micro_batches: int) -> Fraction:
    """Share of a step in which a stage waits: (p-1) / (m+p-1), the same for 1F1B and GPipe.

    Narayanan et al. 2021, section 2.2, with the whole step (not its busy part) as denominator.
    """
    return Fraction(pipe - 1, num_micro_batches + pipe - 1)


def in_flight(schedule: Literal["1f1b", "gpipe"], stage: int, pipe: int, num_micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at its peak."""
    if schedule == "gpipe":
        return num_micro_batches
    return min(pipe - stage, num_micro_batches)
