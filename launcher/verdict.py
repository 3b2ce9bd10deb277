"""The end of an attempt in words and as an exit code: the outcome first, exit codes second. Pure.

An exit code is what is left when no rank could say anything, and then it is never taken as success: a launcher whose
ranks were killed may well exit 0.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EXIT_USAGE
from engine.outcome import Outcome


@dataclass(frozen=True)
class End:
    """The end of one process that we started; a negative code is the signal that killed it."""

    name: str
    code: int

    @property
    def global_rank(self) -> int | None:
        """The rank that the process was; None for a launcher."""
        kind, _, number = self.name.partition("-")
        return int(number) if kind == "rank" else None

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


@dataclass(frozen=True)
class Lost:
    """Ranks that can say nothing any more: killed, or hanging."""

    ranks: frozenset[int]
    how: str
    step: int
    """Steps done."""
    cause: str
    """Text that two failures of the same kind share, whichever rank it was."""


@dataclass(frozen=True)
class NodeReport:
    """An attempt as one node saw it, once all processes there have ended."""

    ends: tuple[End, ...]
    """Ends of the processes, in the order of their commands."""
    first: End | None = None
    """The first that failed; None if none did."""
    gone: frozenset[int] = frozenset()
    """Ranks that had ended when the outcome of a failure came to light."""
    lost: Lost | None = None
    """Ranks that were killed, or hang."""
    stopping: bool = False
    """Somebody asked the run to stop."""
    aside: Outcome | None = None
    """Outcome that a rank could not write to the run folder."""


@dataclass(frozen=True)
class Verdict:
    """Exit code of the launch, words for the user, and the process whose log tells more (if any)."""

    code: int
    words: str
    look_at: str | None = None
    step: int = 0
    """Steps done."""
    lost: frozenset[int] = frozenset()
    """Ranks whose devices are not to be used again."""
    cause: str = ""
    """Text that two failures share where they are the same; empty where nothing failed."""
    stopping: bool = False
    """Somebody had asked the run to stop."""


def judge(outcome: Outcome | None, report: NodeReport, job: str, attempt: int = 0) -> Verdict:
    """Return the verdict over an attempt whose processes have all ended.

    An outcome of another job or attempt says nothing about this one.
    """
    lost, stopping = report.lost, report.stopping
    own = outcome if outcome is not None and outcome.is_of(job, attempt) else None
    # Ranks killed after the run had saved and said so do not turn its success into a failure.
    if lost is not None and (own is None or own.code not in (EXIT_DONE, EXIT_REQUEUE)):
        words = f"failed: {lost.how}"
        if own is not None and own.rank is not None and own.rank not in lost.ranks:
            words += f"; rank {own.rank} then: {own.error.splitlines()[0] if own.error else 'failed'}"
        step = max(lost.step, own.step) if own is not None else lost.step
        return Verdict(EXIT_FAILURE, words, None, step, lost.ranks, lost.cause, stopping)
    if own is not None:
        return _from_outcome(own, report)
    about = "no rank has said how the run ended"
    if outcome is not None:
        whose = f"job {outcome.job}" if outcome.job != job else f"attempt {outcome.attempt} of this job"
        about = f"the outcome in the run folder belongs to {whose}: another run uses the same folder"
    # No rank has said anything, so this is a failure even if all exit codes are 0.
    first = report.first or report.ends[0]
    code = EXIT_FAILURE
    if first.name != "launcher" and first.code == EXIT_USAGE:
        code = EXIT_USAGE  # our own process: nobody stands between its exit code and us
    vanished = "; its ranks were ended" if first.name == "launcher" and first.code < 0 else ""
    # Without the rank's number: a failure that moves from rank to rank is still the same one.
    cause = re.sub(r"^rank-\d+ ", "", str(first))
    return Verdict(code, f"failed: {first}{vanished}; {about}", first.name, cause=cause, stopping=stopping)


def _from_outcome(outcome: Outcome, report: NodeReport) -> Verdict:
    gone, stopping = report.gone, report.stopping
    if outcome.code == EXIT_DONE:
        words = f"done at step {outcome.step}"
    elif outcome.code == EXIT_REQUEUE:
        words = f"saved at step {outcome.step} and wants to be started again (exit code {EXIT_REQUEUE})"
    else:
        words = f"failed at step {outcome.step}: {_blame(outcome, gone)}{outcome.error}"
        # They ended without an exit code that we see (their launcher has it), so they count as killed.
        lost = gone if _only_missed(outcome, gone) else frozenset()
        cause = "gone without a word" if lost else re.sub(r"rank \d+", "a rank", outcome.error)
        return Verdict(outcome.code, words, None, outcome.step, lost, cause, stopping)
    others = [end for end in report.ends if end.code not in (EXIT_DONE, outcome.code)]
    if others:
        words += f"; after that {others[0]}"
    return Verdict(outcome.code, words, step=outcome.step, stopping=stopping)


def _blame(outcome: Outcome, gone: frozenset[int]) -> str:
    """Return the beginning of a sentence that names the failed rank.

    A rank that could still write its outcome may only have missed one that was killed."""
    if _only_missed(outcome, gone):
        missing = ", ".join(map(str, sorted(gone)))
        return f"rank {missing} was gone already, without a word; rank {outcome.rank} then: "
    if outcome.rank is None or outcome.error.startswith(("rank ", "ranks ")):
        return ""  # an error that all ranks agreed on says whose it is
    return f"rank {outcome.rank} first: "


def _only_missed(outcome: Outcome, gone: frozenset[int]) -> bool:
    # Errors that all ranks agree on begin with the rank that they are about.
    said_whose = outcome.rank is None or outcome.error.startswith(("rank ", "ranks "))
    return bool(gone) and not said_whose and outcome.rank not in gone
