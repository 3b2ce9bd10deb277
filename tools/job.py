"""`palimpsest job`: jobs that `palimpsest launch --launcher slurm` has submitted: status, logs, cancel, list.

A job is named by its number, or by its run's folder or file, which stand for the newest job of the run. A chain is one
job, whose links are shown together and cancelled together. Everything is asked of squeue and of the run folder; where
the cluster keeps accounts, sacct still knows older jobs.
"""

from __future__ import annotations

import getpass
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import EnvironmentProblem
from engine.logs import duration
from launcher.slurm import client, job_logs, render, submit
from launcher.slurm.client import Job

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Named = Annotated[str, typer.Argument(metavar="JOB|RUN", help="Number of a job, or a run's folder or file.")]
_NUMBER = re.compile(r"(\d+)(_\d+)?")
"""Number of a job or of a chain, or Slurm's name for one link of it."""
FOLLOW_SECONDS = 1.0
ASK_SECONDS = 30.0
"""Seconds between two questions to Slurm while logs are followed."""
WAITS = {
    "Priority": "it waits behind jobs of higher priority",
    "Resources": "it is next, and waits for nodes",
    "BeginTime": "it was requeued; Slurm starts it again in a few minutes",
    "Dependency": "it waits for the job that it depends on",
    "JobArrayTaskLimit": "it waits for the link of the chain before it",
    "DependencyNeverSatisfied": "the job that it depends on has failed: cancel it",
    "ReqNodeNotAvail": "nodes that it needs are down, reserved or excluded (sinfo -R tells why)",
    "PartitionTimeLimit": "its time is longer than the partition allows: cancel it and ask for less",
    "PartitionNodeLimit": "it asks for more nodes than the partition has: cancel it and ask for fewer",
    "AssocGrpGRES": "the account uses all the GPUs that it may",
    "QOSMaxJobsPerUserLimit": "the account runs as many jobs as it may",
    "JobHeldUser": "it is held: scontrol release JOB",
    "JobHeldAdmin": "an administrator holds it",
}
"""Slurm's word for the reason of waiting -> words for a user."""


@dataclass(frozen=True)
class Found:
    """A job: what Slurm says of it, and its folder; either may be missing."""

    number: str
    jobs: list[Job]
    """One, all links of a chain, or none where Slurm has forgotten it."""
    run_folder: Path | None
    folder: Path | None

    @property
    def job(self) -> Job | None:
        """The job, or of a chain the link that runs, else those that wait, else the last."""
        return _current(self.jobs)


def _current(jobs: list[Job]) -> Job | None:
    waiting = [job for job in jobs if not job.is_over]
    running = [job for job in waiting if job.state != "PENDING"]
    return [*running, *waiting, *sorted(jobs, key=_first_link, reverse=True), None][0]


def _first_link(job: Job) -> int:
    """Return the number of the first link that a line of Slurm's is about.

    Links that were cancelled while they waited are shown without their numbers: they come last.
    """
    found = re.match(r"\d+", job.links)
    return int(found[0]) if found else sys.maxsize


@app.command()
def status(name: Named) -> None:
    """Show where a job stands: its state in the queue, its attempts, its nodes, and how they ended."""
    found = _find(name)
    for line in status_lines(found):
        print(line)


def status_lines(found: Found) -> list[str]:
    """Return the status of a job as lines."""
    job = found.job
    if job is None:
        lines = [f"job {found.number}: Slurm does not know it any more"]
    else:
        where = f" on {job.nodes}" if job.nodes else ""
        time_used = f"{job.elapsed} of {job.limit}"
        lines = [f"job {job.id} ({job.name}): {job.state} for {time_used}, {job.num_nodes} nodes{where}"]
        if job.state == "PENDING":
            word = job.reason.partition(",")[0].strip("()")
            lines.append(f"  {WAITS.get(word, f'it waits: {job.reason}')}")
        if any(one.links for one in found.jobs):
            lines.append(f"  links of the chain: {', '.join(_links(sorted(found.jobs, key=_first_link)))}")
    for attempt in job_logs.attempts(found.folder) if found.folder is not None else []:
        nodes = ", ".join(attempt.nodes)
        seconds = (attempt.ended or time.time()) - attempt.began
        end = attempt.words or ("runs" if job is not None and not job.is_over else "ended without a word")
        lines.append(
            f"  attempt {attempt.number}: {attempt.num_ranks} ranks ({attempt.layout}) on {nodes}, "
            f"{duration(seconds)}: {end}"
        )
    if found.run_folder is not None:
        lines.append(f"  step, loss and time left: palimpsest status {found.run_folder}")
    return lines


def _links(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield the links of a chain with their state, those that follow one another in one state together.

    Slurm lists links that wait as one job until somebody changes one of them, and apart from then on.
    """
    for state, alike in itertools.groupby(jobs, key=lambda job: job.state):
        # "3-4" and "5" are 3-5; links that were cancelled while they waited have no numbers
        numbers = [number for job in alike for number in job.links.split("-")]
        ends = dict.fromkeys((numbers[0], numbers[-1]))
        yield f"{'-'.join(ends) or 'the rest'} {state}"


@app.command()
def logs(
    name: Named,
    rank: Annotated[int | None, typer.Option(min=0, help="This rank alone.")] = None,
    node: Annotated[str | None, typer.Option(help="Ranks of this node alone.")] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="This attempt (default: the newest).")] = None,
    num_lines: Annotated[int, typer.Option("--lines", min=1, help="Lines from the end of each log.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is written, until the job ends.")] = False,
) -> None:
    """Show the logs of a job by rank and node, the first error on top.

    --follow shows rank 0, unless --rank or --node names others.
    """
    found = _find(name)
    if found.folder is None or found.run_folder is None:
        raise EnvironmentProblem(
            f"the folder of job {found.number} is not known", "a job of palimpsest launch", "name the run's folder"
        )
    if follow:
        everything = rank is None and node is None
        _follow(found, job_logs.Follower(found.folder, 0 if everything else rank, node))
        return
    known = job_logs.attempts(found.folder)
    chosen = [record for record in known if attempt in (None, record.number)]
    if not chosen:
        numbers = ", ".join(str(record.number) for record in known)
        print(f"job {found.number} has " + (f"no attempt {attempt}, but {numbers}" if known else "no attempt yet"))
        print("\n".join(_conductor(found, num_lines)))
        return
    print("\n".join(log_lines(found, chosen[-1], rank, node, num_lines)))


def log_lines(
    found: Found, attempt: job_logs.AttemptRecord, rank: int | None, node: str | None, num_lines: int
) -> list[str]:
    """Return the first error of an attempt, and below it the ends of the logs, by node and rank."""
    assert found.run_folder is not None
    assert found.folder is not None
    lines = []
    failed, error = job_logs.first_error(found.run_folder, found.folder, attempt)
    if error:
        where = "" if failed is None else f", rank {failed} on {attempt.node_of(failed)}"
        lines += [f"== first error of attempt {attempt.number}{where}", *error.splitlines(), ""]
    for number in job_logs.selected(attempt, rank, node):
        path = job_logs.log_of(found.folder, attempt.number, number)
        lines.append(f"== rank {number} on {attempt.node_of(number)} ({path})")
        lines += job_logs.tail(path, num_lines) or ["(nothing)"]
    return lines


def _conductor(found: Found, num_lines: int) -> list[str]:
    """Return the end of the conductor's own log."""
    assert found.folder is not None
    paths = sorted(found.folder.glob("conductor-*.log"))
    return [line for path in paths for line in [f"== conductor ({path})", *job_logs.tail(path, num_lines)]]


def _follow(found: Found, follower: job_logs.Follower) -> None:
    """Print new lines until the job is over; each with its rank and node, the attempt where it changes."""
    asked_at, shown, over = 0.0, -1, False
    while True:
        for attempt, rank, node, line in follower.new_lines():
            if attempt != shown:
                print(f"== attempt {attempt}", flush=True)
                shown = attempt
            print(f"[rank {rank} {node}] {line}", flush=True)
        if over:
            return
        if time.monotonic() - asked_at > ASK_SECONDS:
            # The newest number: the job may have submitted its successor.
            numbers = submit.numbers_of(found.folder) if found.folder is not None else []
            job = _current(client.jobs(numbers[-1:] or (found.number,)))
            asked_at, over = time.monotonic(), job is None or job.is_over
            if job is not None and job.state == "PENDING":
                print(f"(job {job.id} waits: {WAITS.get(job.reason, job.reason)})", file=sys.stderr, flush=True)
        time.sleep(0 if over else FOLLOW_SECONDS)


@app.command()
def cancel(
    name: Named,
    now: Annotated[
        bool, typer.Option("--now", help="End it at once: what came after the newest checkpoint is lost.")
    ] = False,
) -> None:
    """Cancel a job: the ranks save and stop, and it is not requeued. A job that waits in the queue is removed.

    Of a chain all links are cancelled.
    """
    found = _find(name)
    job = found.job
    if job is None or job.is_over:
        state = "not known to Slurm any more" if job is None else job.state
        print(f"job {found.number} is {state}: there is nothing to cancel")
        return
    saves = job.state == "RUNNING" and not now
    # Links that wait first, so that none starts meanwhile. SIGINT and not SIGTERM: the conductor takes TERM for the
    # cluster's, after which it has the job requeued.
    refused = client.cancel_waiting(found.number) if saves and job.links else ""
    refused = refused or (client.signal_batch(job.id, "INT") if saves else client.cancel(found.number))
    if refused:
        raise EnvironmentProblem(f"Slurm does not cancel job {found.number}: {refused}", "", "see scontrol show job")
    print(f"job {found.number} {'saves and stops: palimpsest job status ' + found.number if saves else 'is cancelled'}")


@app.command("list")
def list_jobs(
    everything: Annotated[
        bool, typer.Option("--all", help="Also jobs that are over, as far as Slurm knows them.")
    ] = False,
) -> None:
    """List this user's jobs of palimpsest launch: number, state, time, nodes, run folder."""
    jobs = [job for job in client.jobs(user=getpass.getuser()) if job.comment.partition(" ")[0] == render.COMMENT]
    shown = [job for job in jobs if everything or not job.is_over]
    for line in table(shown):
        print(line)
    if not shown:
        print("no jobs" if everything else "no jobs wait or run (--all shows those that are over)")


def table(jobs: list[Job]) -> list[str]:
    """Return jobs as lines of columns; nothing for none."""
    if not jobs:
        return []
    rows = [("job", "state", "time", "limit", "nodes", "run")]
    rows += [(j.id, j.state, j.elapsed, j.limit, j.nodes or j.num_nodes, j.comment.partition(" ")[2]) for j in jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _find(name: str) -> Found:
    """Return the job that a number, a run folder or a run file names.

    Raises:
        EnvironmentProblem: it names none.
    """
    if match := _NUMBER.fullmatch(name):
        return _by_number(match[1])
    path = Path(name)
    if path.is_file():
        from engine.checkpoint.interchange.initial import model_of
        from engine.config.load import load_run

        path = load_run(path, None, model_of).folder
    folders = submit.job_folders(path)
    if not folders:
        raise EnvironmentProblem(
            f"{name} has no job", "a number, or the folder or file of a run that was submitted", "palimpsest job list"
        )
    number = submit.numbers_of(folders[-1])[-1]
    return Found(number, client.jobs((number,)), path.absolute(), folders[-1])


def _by_number(number: str) -> Found:
    """Return the job of a number; of one that has submitted its successor, the newest.

    Raises:
        EnvironmentProblem: Slurm does not know it.
    """
    jobs = client.jobs((number,))
    if not jobs:
        raise EnvironmentProblem(
            f"Slurm does not know job {number}",
            "a job that waits or runs, or a recent one where the cluster keeps accounts",
            "name the run's folder instead: palimpsest job status RUN",
        )
    run_folder = Path(text) if (text := jobs[0].comment.partition(" ")[2]) else None
    found = Found(jobs[0].number, jobs, run_folder, None)
    for folder in submit.job_folders(run_folder) if run_folder is not None else []:
        if found.number in (numbers := submit.numbers_of(folder)):
            found = Found(numbers[-1], jobs, run_folder, folder)
    # A link of a chain has a number of its own, too, and a job whose successor was submitted has another.
    return found if found.number == number else replace(found, jobs=client.jobs((found.number,)))
