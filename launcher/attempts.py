"""The attempts of one launch: each is supervised, judged, and followed by another one where that helps.

What a node saw of an attempt (`NodeReport`) and what the run concludes from it are apart. The outcome that the ranks
left in the run folder is read first and exit codes second; where no rank could write one, it is
written here. Nothing here prints: `tell` takes the lines for the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine import outcome
from engine.config.schema.run import LaunchConfig, RunConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, PalimpsestError
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from engine.switch_files import STOP, refuse_stopped
from launcher.commands import Node, Wanted, commands
from launcher.devices import accelerator
from launcher.extensions import prepare_extensions
from launcher.ports import free_port
from launcher.ranks import LocalRanks, Ranks
from launcher.restarts import Restarts, next_attempt
from launcher.signals import Signals
from launcher.supervise import supervise
from launcher.verdict import NodeReport, Verdict, judge


@dataclass(frozen=True)
class Ending:
    """The verdict over the last attempt of a launch, and the reason for no further one (empty where none was due)."""

    verdict: Verdict
    refusal: str
    no_world: bool = False
    """A further attempt was due, but the nodes that are left make no valid world."""


class Starter(Protocol):
    """Starter of attempts: on this node, or on the nodes of a Slurm job."""

    start: Start
    """The coming attempt, as the run folder is taken for it."""

    def plan(self) -> str | None:
        """Choose the world of the first attempt; return it in words, or None where there is none."""
        ...

    def ranks(self, owned: RunFolder) -> Ranks:
        """Return the ranks of the coming attempt, which are not started yet."""
        ...

    def next(self, verdict: Verdict) -> str | None:
        """Choose the world after an attempt that failed; return it in words, or None where there is none."""
        ...

    def ended(self, verdict: Verdict) -> None:
        """Take note of the end of an attempt."""
        ...


@dataclass
class OneNode:
    """Starter of attempts on this node."""

    run: RunConfig
    wanted: Wanted
    node: Node
    start: Start = field(init=False)
    _asked: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.start, self._asked = Start(self.wanted.job, self.wanted.attempt), self.wanted.overrides

    def plan(self) -> str:
        """Return the ranks of the first attempt, which the user has chosen, in words."""
        return f"{self.wanted.world_size} ranks"

    def ranks(self, owned: RunFolder) -> LocalRanks:
        """Return the ranks of the coming attempt."""
        return LocalRanks(commands(self.wanted, self.node), owned, self.wanted.world_size)

    def next(self, verdict: Verdict) -> str:
        """Choose the ranks after an attempt that failed: all, or without those that were lost."""
        self.wanted, self.node, world = next_attempt(
            self.run, self._asked, self.wanted, self.node, verdict, free_port(), accelerator()
        )
        self.start = Start(self.wanted.job, self.wanted.attempt)
        return f"{self.wanted.world_size} ranks" if world is None else f"{world.size} ranks ({world.layout})"

    def ended(self, verdict: Verdict) -> None:
        """Do nothing: the user sees it."""


def run_attempts(
    run: RunConfig, starter: Starter, restarts: Restarts, tell: Callable[[str], None], signals: Signals | None = None
) -> Ending:
    """Take the run folder, start attempt after attempt, and return the ending of the last one.

    `signals` are those of the process, where handlers are set already; else they are set here.

    Raises:
        PalimpsestError: nothing could be started; that is the outcome in the run folder, too, if it could be taken.
    """
    with RunFolder(run.folder, starter.start) as owned, nullcontext(signals) if signals else Signals() as inbox:
        try:
            # Asked before the folder is taken: a start that is not the job's any more must clear nothing there.
            planned = starter.plan()
            # Taken before anything is cleared: what is there may belong to a run that still goes on.
            owned.take(supervisor=True)
            owned.clear()
            refuse_stopped(run.folder)
            if planned is None:
                words = "failed: the nodes that are there make no world in which this run can start"
                owned.note_failure(Outcome(owned.start.job, owned.start.attempt, EXIT_FAILURE, 0, None, words))
                return Ending(Verdict(EXIT_FAILURE, words), "", no_world=True)
            ending = _loop(run, starter, restarts, owned, tell, inbox)
            if ending.verdict.code == EXIT_REQUEUE and inbox.arrived:
                inbox.ignore_from_now_on()
            return ending
        except PalimpsestError as error:
            start = owned.start
            owned.note_failure(Outcome(start.job, start.attempt, error.exit_code, 0, None, str(error)))
            raise


def _loop(
    run: RunConfig,
    starter: Starter,
    restarts: Restarts,
    owned: RunFolder,
    tell: Callable[[str], None],
    signals: Signals,
) -> Ending:
    while True:
        # Before each attempt: ranks that were killed in the last one may have left a build lock.
        prepare_extensions(run.folder, os.environ)
        verdict = attempt(starter.ranks(owned), owned, signals, run.launch)
        starter.ended(verdict)
        refusal = restarts.refusal(verdict)
        if refusal is None and (run.folder / STOP).exists():
            refusal = f"not restarted: {run.folder / STOP} is there"
        if refusal is not None:
            return Ending(verdict, refusal)
        tell(verdict.words)
        where = starter.next(verdict)
        if where is None:
            return Ending(verdict, "not restarted: the nodes that are left make no valid world", no_world=True)
        tell(f"restart {restarts.used} of {restarts.limit} on {where}")
        # The same handle takes the folder for the next attempt, so that no other launch slips in between.
        owned.take(starter.start, supervisor=True)
        owned.clear()


def attempt(ranks: Ranks, owned: RunFolder, signals: Signals, limits: LaunchConfig | None = None) -> Verdict:
    """Supervise one attempt, for which the run folder is taken and cleared, and return the verdict over it."""
    return conclude(owned, supervise(ranks, owned, signals, limits))


def conclude(owned: RunFolder, report: NodeReport) -> Verdict:
    """Return the verdict over an attempt.

    A failure that no rank could tell of is written to `outcome.json`, and so is an outcome that a rank could not write
    there. Where that fails here, too, the verdict says so: what reads the file later finds none.
    """
    job, number = owned.start.job, owned.start.attempt
    said = outcome.read(owned.path)
    told = said is not None and said.is_of(job, number)
    aside = report.aside if report.aside is not None and report.aside.is_of(job, number) else None
    verdict = judge(said if told or aside is None else aside, report, job, number)
    found = None if told else aside
    # The outcome that a rank wrote stays, unless ranks were lost: a rank that is left can only tell that they vanished.
    if verdict.code not in (EXIT_DONE, EXIT_REQUEUE) and (verdict.lost or not (told or aside)):
        ranks = sorted(verdict.lost)  # the neighbour that noticed is not the one to name
        found = Outcome(job, number, verdict.code, verdict.step, ranks[0] if ranks else None, verdict.words)
    error = owned.note(found) if found is not None else None
    if error is None:
        return verdict
    lacking = f"{owned.path / outcome.FILE} cannot be written: {error.strerror or error}"
    return replace(verdict, words=f"{verdict.words}; {lacking}")
