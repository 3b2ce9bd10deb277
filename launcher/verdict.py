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


def judge(
    outcome: Outcome | None, ends: list[End], first: End | None, job: str, gone: frozenset[int] = frozenset()
) -> Verdict:
    """The verdict over a launch whose processes have all ended.

    `ends` are in the order of their commands, `first` is the first that failed, if any did; `gone` the ranks that had
    ended when the outcome of a failure came to light.
    """
    if outcome is not None and outcome.job == job:
        return _from_outcome(outcome, ends, gone)
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


def _from_outcome(outcome: Outcome, ends: list[End], gone: frozenset[int]) -> Verdict:
    if outcome.code == EXIT_DONE:
        words = f"done at step {outcome.step}"
    elif outcome.code == EXIT_REQUEUE:
        words = f"saved at step {outcome.step} and wants to be started again (exit code {EXIT_REQUEUE})"
    else:
        return Verdict(outcome.code, f"failed at step {outcome.step}: {_blame(outcome, gone)}{outcome.error}")
    others = [end for end in ends if end.code not in (EXIT_DONE, outcome.code)]
    if others:
        words += f"; after that {others[0]}"
    return Verdict(outcome.code, words)


def _blame(outcome: Outcome, gone: frozenset[int]) -> str:
    """Whose failure it was: a rank that could still write may only have missed one that was killed."""
    if outcome.rank is None or outcome.error.startswith("rank "):
        return ""  # an error that all ranks agreed on says whose it is
    if gone and outcome.rank not in gone:
        missing = ", ".join(map(str, sorted(gone)))
        return f"rank {missing} was gone already, without a word; rank {outcome.rank} then: "
    return f"rank {outcome.rank} first: "
