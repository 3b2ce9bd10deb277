"""Follow-up of a start of a job: it ends, starts again, or leaves the run to the next link of its chain.

A job starts again only where the ranks have saved and want it (85), where they failed after they were told to stop (an
earlier checkpoint is there), or where the nodes that are left make no valid world. Slurm requeues it; where a site has
that disabled, the job submits its successor itself. A chain is an array of jobs of which one runs at a time, each
started once: its next link is in the queue already, so the end of a link only decides whether the rest is cancelled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from engine import outcome
from engine.config.load import load_run
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE, EnvironmentProblem, PalimpsestError
from engine.switch_files import STOP
from launcher.attempts import Ending
from launcher.environment import RESTARTS_PER_START
from launcher.left_over import left_over
from launcher.slurm import client
from launcher.slurm.spec import ATTEMPTS_FILE, NUMBER_FILE, JobSpec
from launcher.slurm.starts import JobStart, successor_arguments
from launcher.variables import OVERRIDES
from launcher.verdict import Verdict

CONTROLLER_SECONDS = 300.0
"""Seconds that Slurm's controller may be away before an attempt is given up for want of an answer."""
ENDED = "chain-ended"
"""File in the folder of a chain that says why its links that are left have nothing to do."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables of Slurm's that a job passes on to its successor; the others are about the job itself."""


def say(words: str) -> None:
    """Tell the user, in the log of the job."""
    print(f"palimpsest launch: {words}", flush=True)


def read_run(job: JobSpec, asked: Sequence[str]) -> RunConfig:
    """Return the run of a job as its file says now: a run stage may have been appended since the last start.

    Its model, where the file leaves it to the source of `init_from`, is the one that the submission has found.
    """
    return load_run(job.config, list(asked), lambda source: job.model or {})


def conclude(
    job: JobSpec, start: JobStart, ending: Ending, missing: Sequence[str], cancelled: bool, asked: Sequence[str]
) -> int:
    """Say how a start has ended, have the run go on where that is due, and return the exit code of the batch script.

    `missing` are nodes that the next start does not want; `cancelled` is True after `palimpsest job cancel`; `asked`
    are the user's overrides.
    """
    say(ending.verdict.words)
    if ending.refusal:
        say(ending.refusal)
    goes_on = ending.verdict.code == EXIT_REQUEUE or ending.no_world or failed_stop(ending.verdict)
    stopped = _stopped(job, cancelled) or _fails_to_stop(job, start, ending.verdict) if goes_on else ""
    if job.chain is not None:
        _conclude_link(job, start, ending, missing, stopped, asked)
    elif goes_on and stopped:
        say(f"not requeued: {stopped} to go on")
    elif goes_on:
        _start_again(job, start, missing)
    return ending.verdict.code


def failed_stop(verdict: Verdict) -> bool:
    """Return True for a failure after the ranks were told to stop: time was up, and they could not save, say.

    Nothing of the run itself is known to be wrong: it can go on from its newest checkpoint.
    """
    return verdict.stopping and verdict.code == EXIT_FAILURE


def _fails_to_stop(job: JobSpec, start: JobStart, verdict: Verdict) -> str:
    """Return words for a start that failed after it was told to stop, as the newest attempt of an earlier start did.

    Once more would be no accident, and nothing that is trained would ever be kept. Empty for another.
    """
    try:
        records = [json.loads(line) for line in (job.folder / ATTEMPTS_FILE).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return ""
    before = [one for one in records if "ended" in one and one["attempt"] // RESTARTS_PER_START != start.index]
    if not (failed_stop(verdict) and before and before[-1]["failed_stop"]):
        return ""
    return "two starts in a row have failed while they stopped; submit it again"


def _stopped(job: JobSpec, cancelled: bool) -> str:
    """Return the words for a run that the user has stopped, and what to do to go on; empty for another."""
    if (job.run_folder / STOP).exists():
        return f"{job.run_folder / STOP} is there; remove it and submit the job again"
    return "it was cancelled with `palimpsest job cancel`; submit it again" if cancelled else ""


def _start_again(job: JobSpec, start: JobStart, missing: Sequence[str]) -> None:
    """Requeue the job or submit its successor, within its limit."""
    way = job.site.requeue
    if way == "none" or start.index >= job.requeues:
        why = "this site requeues no jobs (--chain does without)" if way == "none" else ""
        say(f"not requeued: {why or f'all {job.requeues} requeues are used up'}; submit it again to go on")
        return
    found = client.patiently(lambda: client.allocated(start.number), CONTROLLER_SECONDS, say)
    if found is not None and found.restarts > start.requeues:
        say("Slurm has requeued the job by itself, as it does after a preemption")
        return
    if found is None or not found.is_running:
        say(f"not requeued: the job is {found.state if found else 'unknown to Slurm'}")
        return
    say(f"requeue {start.index + 1} of {job.requeues}" + (f", without {', '.join(missing)}" if missing else ""))
    if way == "slurm":
        refused = client.requeue(start.number, missing)
        if refused:
            say(f"Slurm does not requeue the job: {refused}; submit it again to go on")
        return
    try:
        successor = submit_successor(job, start, missing)
    except EnvironmentProblem as error:
        say(f"not requeued: {error.wrong}; submit it again to go on")
        return
    say(f"job {successor} goes on" if successor else "another node has submitted the next start")


def submit_successor(
    job: JobSpec,
    start: JobStart,
    missing: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    ask: client.Run | None = None,
) -> str:
    """Submit the start after this one, which waits for its end, and return its number; empty where another was first.

    The conductor and the agents may ask for it at the same time: one file in the folder of the job is made by one of
    them alone.

    Raises:
        EnvironmentProblem: Slurm refuses it, or the folder of the job cannot be written.
    """
    first = job.folder / f"successor-{start.index + 1}"
    try:
        with first.open("x"):
            pass
    except FileExistsError:
        return ""
    except OSError as error:
        raise EnvironmentProblem(f"{first} cannot be written: {error.strerror}; the job has no successor") from error
    exclude = dict.fromkeys((*job.exclude, *missing))
    options = (f"--dependency=afterany:{start.number}", *([f"--exclude={','.join(exclude)}"] if exclude else []))
    foreign = set(left_over(environ)) - {OVERRIDES}
    environment = {
        name: value
        for name, value in environ.items()
        if name not in foreign and (not name.startswith("SLURM_") or name in KEPT)
    }
    try:
        number = client.submit(
            (*job.site.allocation.submit, *options),
            job.script,
            successor_arguments(start),
            ask or partial(client.run, environment=environment),
        )
    except EnvironmentProblem:
        first.unlink(missing_ok=True)
        raise
    with (job.folder / NUMBER_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{number}\n")
    return number


def _conclude_link(
    job: JobSpec, start: JobStart, ending: Ending, missing: Sequence[str], stopped: str, asked: Sequence[str]
) -> None:
    """Cancel the links that are left, or leave the run to the next one."""
    assert job.chain is not None
    code, link = ending.verdict.code, start.index + 1
    appended = code == EXIT_DONE and not _is_done(job, lambda: read_run(job, asked))
    if stopped or not (code == EXIT_REQUEUE or ending.no_world or failed_stop(ending.verdict) or appended):
        end_chain(job, start, stopped or ("the run is done" if code == EXIT_DONE else "the run cannot go on"))
    elif link == job.chain:
        say(f"all {job.chain} links of the chain are used up; submit it again to go on")
    else:
        why = "a run stage was appended; " if appended else ""
        without = f", without {', '.join(missing)}" if missing else ""
        say(f"{why}link {link} of {job.chain} is over, the next one goes on{without}")
        rest = f"{start.job}_[{link + 1}-{job.chain}]"
        if missing and (refused := client.exclude_nodes(rest, [*job.exclude, *missing])):
            say(f"Slurm does not leave these nodes out: {refused}")


def _is_done(job: JobSpec, run: Callable[[], RunConfig]) -> bool:
    """Return True if the run has ended at the last step of what its file asks for now."""
    said = outcome.read(job.run_folder)
    try:
        return said is not None and said.ends(run().num_steps)
    except PalimpsestError:  # the file is being edited
        return True


def nothing_to_do(job: JobSpec, start: JobStart, run: RunConfig) -> str:
    """Return the reason for which a link of a chain has nothing to do; empty where it has."""
    if job.chain is None or start.index == 0:
        return ""
    if _is_done(job, lambda: run):
        return "the run is done"
    try:
        return (job.folder / ENDED).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def end_chain(job: JobSpec, start: JobStart, why: str) -> None:
    """Cancel the links that wait, and leave the reason to those that start all the same."""
    if job.chain is None:
        return
    say(f"the chain ends at link {start.index + 1} of {job.chain}: {why}")
    if start.index + 1 >= job.chain:
        return
    try:
        (job.folder / ENDED).write_text(f"{why}\n", encoding="utf-8")
    except OSError as error:
        say(f"{job.folder / ENDED} cannot be written: {error.strerror}")
    refused = client.cancel_waiting(start.job)
    if refused:
        say(f"Slurm does not cancel the links that wait: {refused}; they end when they start")
