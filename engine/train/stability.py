"""Which steps are taken: a step that is not finite or a spike is skipped, and after many spikes the run goes back.

Every rank judges from the same all-reduced loss and norm, so all decide alike and nothing is sent. What the
judgement remembers is plain numbers in the train state: a restart judges as the run that never stopped.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from engine.config.schema.optimizer import StabilityConfig
from engine.errors import PalimpsestError
from engine.parallel.zero import NotFinite, finite

Verdict = Literal["accept", "not_finite", "spike"]


REMEDY = "look at the data or lower optimizer.learning_rate, then train again from the last checkpoint"


class Unstable(PalimpsestError):
    """More steps were skipped, or more rollbacks made, than the configuration bears."""


@dataclass
class StabilityState:
    """What the next verdicts depend on; equal on every rank."""

    losses: list[float] = field(default_factory=list)
    """Of the last accepted steps, oldest first, and so on; kept where spikes are looked for."""
    norms: list[float] = field(default_factory=list)
    skips: int = 0
    """Steps skipped in a row up to now."""
    spikes: list[tuple[int, int]] = field(default_factory=list)
    """(step, position of its first sample) of each spike within the last `rollback_steps` steps."""
    rollbacks: int = 0
    """Rollbacks made."""

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> StabilityState:
        """The state of a checkpoint's section."""
        spikes = [(step, position) for step, position in section["spikes"]]
        return cls(section["losses"], section["norms"], section["skips"], spikes, section["rollbacks"])

    def after_rollback(self, rollbacks: int) -> StabilityState:
        """This state, of a checkpoint, when the run has gone back to it for the so-manieth time."""
        return replace(self, spikes=[], skips=0, rollbacks=rollbacks)


class Guard:
    """Judges one step after another and keeps the state."""

    def __init__(self, config: StabilityConfig, state: StabilityState) -> None:
        self.config, self.state = config, state

    def judge(self, step: int, position: int, loss: float, norm: float) -> Verdict:
        """Whether `step` (from 0), whose first sample has that position in the stream, may change the weights.

        Raises:
            NotFinite: loss or norm is not finite, and `non_finite` is `stop`.
            Unstable: more than `max_skips` steps in a row were skipped.
        """
        verdict = self._verdict(loss, norm)
        state, config = self.state, self.config
        if verdict == "accept":
            state.skips = 0
            if config.spike_sigma is not None:
                state.losses = [*state.losses, loss][-config.window :]
                state.norms = [*state.norms, norm][-config.window :]
            return verdict
        state.skips += 1
        if verdict == "spike":
            state.spikes.append((step, position))
        state.spikes = [spike for spike in state.spikes if spike[0] > step - config.rollback_steps]
        if state.skips > config.max_skips:
            raise Unstable(
                f"{state.skips} steps in a row were skipped; the last had loss {loss:.6g} and gradient norm {norm:.6g}",
                f"stability.max_skips = {config.max_skips} at most",
                REMEDY,
            )
        return verdict

    def offending(self) -> int | None:
        """The position from which samples are to be left out in a rollback; None while there is no need of one.

        Raises:
            Unstable: it would be one rollback more than `max_rollbacks`.
        """
        wanted, most = self.config.rollback_spikes, self.config.max_rollbacks
        if wanted is None or len(self.state.spikes) < wanted:
            return None
        if self.state.rollbacks == most:
            raise Unstable(
                f"step {self.state.spikes[-1][0] + 1}: the loss still spikes after {most} rollbacks",
                f"stability.max_rollbacks = {most} at most",
                REMEDY,
            )
        return self.state.spikes[0][1]

    def _verdict(self, loss: float, norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if self.config.non_finite == "skip":
                return "not_finite"
            finite(norm)
            raise NotFinite(f"the loss is {loss}", "a finite number", "look at the batch's data and the model")
        high = self._is_high(loss, self.state.losses) or self._is_high(norm, self.state.norms)
        return "spike" if high else "accept"

    def _is_high(self, value: float, before: list[float]) -> bool:
        """More than `spike_sigma` standard deviations above the mean of a full window."""
        sigma = self.config.spike_sigma
        if sigma is None or len(before) < self.config.window:
            return False
        return value > statistics.fmean(before) + sigma * statistics.pstdev(before)
