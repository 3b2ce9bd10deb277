"""Where a run stands: the half of its state that is not tensors, as plain numbers.

Everything random is a pure function of (seed, position), so a restart needs the numbers below and the loader's few
integers, and no generator's state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Counts of a run; equal on every rank."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    """Weight updates done: what Adam's bias correction counts. Less than `step` where steps were skipped."""
    samples: int = 0
    """Samples consumed."""
    tokens: int = 0
    """Tokens consumed, padding included."""
    loss: float | None = None
    """Training loss of the last step, so that a restart can show where it goes on."""

    def section(self) -> dict[str, Any]:
        """The state as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> TrainState:
        """The state of a checkpoint's section."""
        return cls(**section)
