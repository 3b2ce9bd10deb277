"""The attempts of one launch: each is supervised, judged, and followed by another one where that helps.

What a node saw of an attempt (`NodeReport`) and what the run concludes from it are apart. The outcome that the ranks
left in the run folder is read first and exit codes second (contract "Outcome"); where no rank could write one, it is
written here. Nothing here prints: `tell` takes the lines for the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine import outcome
from engine.config.schema.run import LaunchConfig, RunConfig
from engine.errors import EXIT_DONE, EXIT_REQUEUE, PalimpsestError
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from engine.switch_files import STOP, refuse_stopped
from launcher.commands import Command, Node, Wanted, commands
from launcher.devices import accelerator
from launcher.extensions import prepare_extensions
from launcher.ports import free_port
from launcher.restarts import Restarts, next_attempt
from launcher.supervise import supervise
from launcher.verdict import NodeReport, Verdict, judge


@dataclass(frozen=True)
class Ending:
    """The verdict over the last attempt of a launch, and the reason for no further one (empty where none was due)."""

    verdict: Verdict
    refusal: str


def run_attempts(run: RunConfig, wanted: Wanted, node: Node, restarts: Restarts, tell: Callable[[str], None]) -> Ending:
    """Take the run folder, start attempt after attempt on this node, and return the ending of the last one.

    Raises:
        PalimpsestError: nothing could be started; that is the outcome in the run folder, too, if it could be taken.
    """
    with RunFolder(run.folder, Start(wanted.job, wanted.attempt)) as owned:
        try:
            # Taken before anything is cleared: what is there may belong to a run that still goes on.
            owned.take(supervisor=True)
            owned.clear()
            refuse_stopped(run.folder)
            return _loop(run, wanted, node, restarts, owned, tell)
        except PalimpsestError as error:
            start = owned.start
            owned.note_failure(Outcome(start.job, start.attempt, error.exit_code, 0, None, str(error)))
            raise


def _loop(
    run: RunConfig, wanted: Wanted, node: Node, restarts: Restarts, owned: RunFolder, tell: Callable[[str], None]
) -> Ending:
    asked = wanted.overrides
    while True:
        # Before each attempt: ranks that were killed in the last one may have left a build lock.
        prepare_extensions(run.folder, os.environ)
        verdict = attempt(commands(wanted, node), owned, wanted.world_size, run.launch)
        refusal = restarts.refusal(verdict)
        if refusal is None and (run.folder / STOP).exists():
            refusal = f"not restarted: {run.folder / STOP} is there"
        if refusal is not None:
            return Ending(verdict, refusal)
        tell(verdict.words)
        wanted, node, world = next_attempt(run, asked, wanted, node, verdict, free_port(), accelerator())
        where = f"{wanted.world_size} ranks" if world is None else f"{world.size} ranks ({world.layout})"
        tell(f"restart {restarts.used} of {restarts.limit} on {where}")
        # The same handle takes the folder for the next attempt, so that no other launch slips in between.
        owned.take(Start(wanted.job, wanted.attempt), supervisor=True)
        owned.clear()


def attempt(to_start: list[Command], owned: RunFolder, num_ranks: int, limits: LaunchConfig | None = None) -> Verdict:
    """Supervise one attempt, for which the run folder is taken and cleared, and return the verdict over it."""
    return conclude(owned, supervise(to_start, owned, num_ranks, limits))


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
    # A rank's own word stays, except where ranks were lost: then it only tells of a neighbour that was missed.
    if verdict.code not in (EXIT_DONE, EXIT_REQUEUE) and (verdict.lost or not (told or aside)):
        ranks = sorted(verdict.lost)  # the neighbour that noticed is not the one to name
        found = Outcome(job, number, verdict.code, verdict.step, ranks[0] if ranks else None, verdict.words)
    error = owned.note(found) if found is not None else None
    if error is None:
        return verdict
    lacking = f"{owned.path / outcome.FILE} cannot be written: {error.strerror or error}"
    return replace(verdict, words=f"{verdict.words}; {lacking}")
