"""Hook that skips bad steps and, after many of them, takes the run back and leaves out their samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.schema.optimizer import StabilityConfig
from engine.logs import logger
from engine.train.hooks import Hook, Run, Update
from engine.train.records import Record
from engine.train.stability import Guard, StabilityState, Verdict

_log = logger(__name__)


class Stability(Hook):
    """Hook that judges each step by a `Guard` and keeps the guard's state in checkpoints."""

    section = "stability"

    def __init__(self, config: StabilityConfig) -> None:
        self.guard = Guard(config, StabilityState())
        self._verdict: Verdict = "accept"

    def before_update(self, run: Run, update: Update) -> bool:
        """Refuse an update whose loss or gradient norm is not finite or a spike. Raises as `Guard.judge`."""
        self._verdict = self.guard.judge(update.step, update.position, update.loss, update.gradient_norm)
        if self._verdict != "accept":
            norm = update.gradient_norm
            _log.warning("step %d is skipped: loss %.6g, gradient norm %.6g", update.step + 1, update.loss, norm)
        return self._verdict == "accept"

    def after_step(self, run: Run) -> Record:
        """Return `skipped` for a step whose update was refused."""
        return {} if self._verdict == "accept" else {"skipped": 1}

    def roll_back(self, run: Run) -> bool:
        """Go back to the newest whole checkpoint after too many spikes, and leave out the samples since the first one.

        What is left out is saved at once, so that a restart knows of it.

        Raises:
            Unstable: there is no checkpoint, or this would be one rollback too many.
        """
        first = self.guard.offending(run.state.rollbacks)
        if first is None:
            return False
        # before going back, which moves both
        spiked, end = run.state.step, run.feed.stream.position
        run.go_back(first)
        # Before the save: a kill between the two leaves a record that no checkpoint counts, which the next start cuts.
        step, rollbacks = run.state.step + 1, run.state.rollbacks
        run.write({"step": step, "rollback": rollbacks, "left_out_from": first, "left_out_to": end})
        run.save(wait=True)
        # `go_back` has stopped reading ahead
        run.feed.start()
        _log.warning(
            "the loss spiked up to step %d: back at step %d, leaving out the samples at %d to %d",
            spiked,
            run.state.step,
            first,
            end - 1,
        )
        return True

    def after_rollback(self, run: Run) -> None:
        """Forget the spikes that led to the rollback, or that the checkpoint knows of."""
        self.guard.state = self.guard.state.after_rollback()

    def state(self) -> dict[str, Any]:
        """Return what the next verdicts depend on."""
        return self.guard.state.section()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.guard.state = StabilityState.from_section(dict(state))
