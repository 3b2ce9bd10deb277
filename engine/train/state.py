"""Where a run stands: the half of its state that is not tensors, as plain numbers.

Everything random is a pure function of (seed, position), so a restart needs the numbers below and the loader's few
integers, and no generator's state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.train.stability import StabilityState


@dataclass
class TrainState:
    """Counts of a run; equal on every rank."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    """Weight updates done: what Adam's bias correction counts. Less than `step` where steps were skipped."""
    samples: int = 0
    """Samples trained on; those that a rollback left out stand in the loader's state."""
    tokens: int = 0
    """Tokens trained on, padding included."""
    loss: float | None = None
    """Training loss of the last step that had a finite one, so that a restart can show where it goes on."""
    stability: StabilityState = field(default_factory=StabilityState)

    def section(self) -> dict[str, Any]:
        """The state as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> TrainState:
        """The state of a checkpoint's section."""
        stability = StabilityState.from_section(section["stability"])
        return cls(**{name: value for name, value in section.items() if name != "stability"}, stability=stability)
