"""How a launch ended, in words and as an exit code: the outcome first, exit codes second. Pure.

An exit code is what is left when no rank could say anything, and then it is never taken as success: a launcher whose
ranks were killed may well exit 0.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EXIT_USAGE
from engine.outcome import Outcome


@dataclass(frozen=True)
class End:
    """How one process that we started ended; a negative code is the signal that killed it."""

    name: str
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


@dataclass(frozen=True)
class Verdict:
    """Exit code of the launch, what to tell the user, and the process whose log tells more (if any)."""

    code: int
    words: str
    look_at: str | None = None


def judge(outcome: Outcome | None, ends: list[End], first: End | None, job: str) -> Verdict:
    """The verdict over a launch whose processes have all ended.

    `ends` are in the order of their commands, `first` is the first that failed, if any did.
    """
    if outcome is not None and outcome.job == job:
        return _from_outcome(outcome, ends)
    about = "no rank has said how the run ended"
    if outcome is not None:
        about = f"the outcome in the run folder belongs to job {outcome.job}: another run uses the same folder"
    if first is None:
        first = ends[0]
    code = EXIT_FAILURE
    if first.name != "launcher" and first.code == EXIT_USAGE:
        code = EXIT_USAGE  # our own process: nobody stands between its exit code and us
    vanished = "; its ranks were ended" if first.name == "launcher" and first.code < 0 else ""
    return Verdict(code, f"failed: {first}{vanished}; {about}", look_at=first.name)


def _from_outcome(outcome: Outcome, ends: list[End]) -> Verdict:
    if outcome.code == EXIT_DONE:
        words = f"done at step {outcome.step}"
    elif outcome.code == EXIT_REQUEUE:
        words = f"saved at step {outcome.step} and wants to be started again (exit code {EXIT_REQUEUE})"
    else:
        who = "" if outcome.rank is None else f"rank {outcome.rank} first: "
        return Verdict(outcome.code, f"failed at step {outcome.step}: {who}{outcome.error}")
    others = [end for end in ends if end.code not in (EXIT_DONE, outcome.code)]
    if others:
        words += f"; after that {others[0]}"
    return Verdict(outcome.code, words)
