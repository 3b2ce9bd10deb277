"""Judgement of steps: one that is not finite or a spike is skipped, and after many spikes the run goes back.

Every rank judges from the same all-reduced loss and norm, so all decide alike and nothing is sent. What the guard
remembers is plain numbers in a section of the checkpoint: a restart judges as the run that never stopped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from engine.config.schema.optimizer import StabilityConfig
from engine.errors import PalimpsestError
from engine.parallel.zero import NotFinite, accept_finite

Verdict = Literal["accept", "not_finite", "spike"]


REMEDY = "look at the data or lower optimizer.learning_rate, then train again from the last checkpoint"


class Unstable(PalimpsestError):
    """More steps were skipped, or more rollbacks made, than the configuration allows."""


@dataclass
class StabilityState:
    """State that the next verdicts depend on; equal on every rank."""

    losses: list[float] = field(default_factory=list)
    """Losses of the last accepted steps, oldest first; `norms` likewise. Empty unless spikes are looked for."""
    norms: list[float] = field(default_factory=list)
    skips: int = 0
    """Steps skipped in a row up to now."""
    spikes: list[tuple[int, int]] = field(default_factory=list)
    """(step, position of its first sample) of each spike within the last `rollback_steps` steps."""

    def section(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> StabilityState:
        """Return the state of a checkpoint's section."""
        # JSON has no tuples: they come back as lists.
        spikes = [(step, position) for step, position in section["spikes"]]
        return cls(section["losses"], section["norms"], section["skips"], spikes)

    def after_rollback(self) -> StabilityState:
        """Return this state, which a checkpoint held, for a run that has gone back to that checkpoint."""
        return replace(self, spikes=[], skips=0)


class Guard:
    """Judge of one step after another; keeps the state."""

    def __init__(self, config: StabilityConfig, state: StabilityState) -> None:
        self.config, self.state = config, state

    def judge(self, step: int, position: int, loss: float, norm: float) -> Verdict:
        """Return the verdict on `step` (from 0), whose first sample has that position in the stream.

        Raises:
            NotFinite: loss or norm is not finite, and `non_finite` is `stop`.
            Unstable: more than `max_skips` steps in a row were skipped.
        """
        verdict = self._verdict(loss, norm)
        state, config = self.state, self.config
        if verdict == "accept":
            # Only accepted steps enter the window: a spike would raise mean and deviation, and hide the next one.
            state.skips = 0
            if config.spike_sigma is not None:
                state.losses = [*state.losses, loss][-config.window :]
                state.norms = [*state.norms, norm][-config.window :]
            return verdict
        state.skips += 1
        if verdict == "spike":
            state.spikes.append((step, position))
        # With rollback_steps = 10, a spike at step 25 is counted together with those of steps 16 to 24.
        state.spikes = [spike for spike in state.spikes if spike[0] > step - config.rollback_steps]
        if state.skips > config.max_skips:
            raise Unstable(
                f"{state.skips} steps in a row were skipped; the last had loss {loss:.6g} and gradient norm {norm:.6g}",
                f"stability.max_skips = {config.max_skips} at most",
                REMEDY,
            )
        return verdict

    def offending(self, rollbacks: int) -> int | None:
        """Return the position from which a rollback has to leave out samples; None means that none is needed.

        `rollbacks` are those that the run has made.

        Raises:
            Unstable: it would be one rollback more than `max_rollbacks`.
        """
        wanted, most = self.config.rollback_spikes, self.config.max_rollbacks
        if wanted is None or len(self.state.spikes) < wanted:
            return None
        if rollbacks >= most:
            raise Unstable(
                f"step {self.state.spikes[-1][0] + 1}: the loss still spikes after {most} rollbacks",
                f"stability.max_rollbacks = {most} at most",
                REMEDY,
            )
        # Back to before the first of them: the samples of all spikes are left out, and those between.
        return self.state.spikes[0][1]

    def _verdict(self, loss: float, norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if self.config.non_finite == "skip":
                return "not_finite"
            # raises where the norm is to blame; what remains is the loss
            accept_finite(norm)
            raise NotFinite(f"the loss is {loss}", "a finite number", "look at the batch's data and the model")
        high = self._is_high(loss, self.state.losses) or self._is_high(norm, self.state.norms)
        return "spike" if high else "accept"

    def _is_high(self, value: float, before: list[float]) -> bool:
        """Return True for a value more than `spike_sigma` standard deviations above the mean of a full window."""
        sigma = self.config.spike_sigma
        # The loss falls fast at first: over a short window its deviation says nothing yet.
        if sigma is None or len(before) < self.config.window:
            return False
        return value > statistics.fmean(before) + sigma * statistics.pstdev(before)
