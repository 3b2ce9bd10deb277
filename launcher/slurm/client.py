"""Slurm's commands: submit, ask, signal, cancel and requeue a job. Output is parsed here and nowhere else.

Jobs are asked of `squeue` and `scontrol`, which need no accounting; where the cluster keeps accounts, `sacct` still
knows jobs that the controller has forgotten.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EnvironmentProblem

Run = Callable[[Sequence[str]], "Answer"]
COMMAND_SECONDS = 60.0
"""Seconds that one command of Slurm's may take; the controller may be busy or away."""
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
"""States from which a job does not return."""
_SEPARATOR = "\x1f"
_FORMAT = _SEPARATOR.join(("%i", "%T", "%j", "%M", "%l", "%D", "%N", "%r", "%k"))
_FIELDS = "JobID,State,JobName,Elapsed,Timelimit,NNodes,NodeList,Reason,Comment"


@dataclass(frozen=True)
class Answer:
    """Answer of a command of Slurm's."""

    code: int
    out: str
    error: str


@dataclass(frozen=True)
class Job:
    """One job as Slurm shows it; times and states in Slurm's own words."""

    id: str
    """Its number; `ARRAY_LINK` in a chain, and `ARRAY_[LINKS%1]` for the links that wait."""
    state: str
    name: str
    elapsed: str
    limit: str
    num_nodes: str
    nodes: str
    """Nodes as a Slurm host list; empty while it waits."""
    reason: str
    comment: str

    @property
    def number(self) -> str:
        """Number of the job, or of the whole chain."""
        return self.id.partition("_")[0]

    @property
    def links(self) -> str:
        """Link of a chain, or those that wait (`2-4`); empty for a job that stands alone."""
        return self.id.partition("_")[2].strip("[]").partition("%")[0]

    @property
    def is_over(self) -> bool:
        """True if the job does not return."""
        return self.state.split(" ")[0].rstrip("+") in ENDED


@dataclass(frozen=True)
class Allocated:
    """A job as its own conductor sees it."""

    state: str
    restarts: int
    """Requeues so far."""
    batch_host: str

    @property
    def is_running(self) -> bool:
        """True if the job has its nodes."""
        return self.state == "RUNNING"


class ControllerAway(EnvironmentProblem):
    """Slurm's controller gives no answer."""


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Answer:
    """Run one of Slurm's commands, in this process's environment or another.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    if shutil.which(arguments[0]) is None:
        raise EnvironmentProblem(
            f"{arguments[0]} is not on PATH",
            "a login node of a Slurm cluster",
            "run this where sbatch and squeue are, or load the site's slurm module",
        )
    try:
        done = subprocess.run(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"no answer within {COMMAND_SECONDS:.0f} s")
    return Answer(done.returncode, done.stdout, done.stderr.strip())


def submit(command: Sequence[str], script: Path, arguments: Sequence[str] = (), ask: Run = run) -> str:
    """Submit a batch script with its arguments, and return the job's number.

    Raises:
        EnvironmentProblem: Slurm refuses it.
    """
    answer = ask([*command, "--parsable", str(script), *arguments])
    number = answer.out.strip().splitlines()[-1].partition(";")[0] if answer.code == 0 and answer.out.strip() else ""
    if not number.isdecimal():
        raise EnvironmentProblem(
            f"Slurm refuses the job: {answer.error or answer.out.strip() or 'no job number came back'}",
            "a job within the limits of its account and partition",
            "see sinfo and sacctmgr show assoc, and change the options or the site profile (for example --slurm "
            f"allocation.partition=NAME); the script is {script}",
        )
    return number


def jobs(numbers: Sequence[str] = (), user: str | None = None, ask: Run = run) -> list[Job]:
    """Return jobs by their numbers, or all of a user that Slurm still knows; those it has forgotten are left out."""
    which = ["--jobs=" + ",".join(numbers)] if numbers else [f"--user={user}"] if user else []
    answer = ask(["squeue", "--noheader", "--states=all", f"--format={_FORMAT}", *which])
    # squeue fails where one of the numbers is unknown to it; then each is asked for alone.
    if answer.code != 0 and len(numbers) > 1:
        return [job for number in numbers for job in jobs((number,), ask=ask)]
    found = [parse_job(line) for line in answer.out.splitlines() if line.strip()] if answer.code == 0 else []
    missing = [number for number in numbers if number not in {job.number for job in found}]
    return [*found, *_accounted(missing, user if not numbers else None, {job.id for job in found}, ask)]


def parse_job(line: str) -> Job:
    """Return the job in a line of squeue's."""
    fields = (line.split(_SEPARATOR) + [""] * 9)[:9]
    number, state, name, elapsed, limit, num_nodes, nodes, reason, comment = (field.strip() for field in fields)
    empty = ("(null)", "None", "n/a")
    clean = ["" if field in empty else field for field in (nodes, reason, comment)]
    return Job(number, state, name, elapsed, limit, num_nodes, *clean)


def _accounted(numbers: Sequence[str], user: str | None, known: set[str], ask: Run) -> list[Job]:
    """Return the jobs that accounting knows; none where the cluster keeps no accounts."""
    if not (numbers or user) or (ask is run and shutil.which("sacct") is None):
        return []
    which = ["--jobs=" + ",".join(numbers)] if numbers else [f"--user={user}"]
    answer = ask(["sacct", "--noheader", "--allocations", "--parsable2", f"--delimiter={_SEPARATOR}",
                  f"--format={_FIELDS}", *which])  # fmt: skip
    if answer.code != 0:  # "Slurm accounting storage is disabled"
        return []
    found = [parse_job(line) for line in answer.out.splitlines() if line.strip()]
    return [job for job in found if job.id not in known]


def allocated(number: str, ask: Run = run) -> Allocated | None:
    """Return a job as the controller has it; None where it is not known there any more.

    Raises:
        ControllerAway: the controller gives no answer.
    """
    answer = ask(["scontrol", "--oneliner", "show", "job", number])
    if answer.code != 0:
        if "Invalid job id" in answer.error:
            return None
        raise ControllerAway(f"slurmctld gives no answer about job {number}: {answer.error}")
    words: dict[str, str] = {}
    for word in answer.out.split():
        key, _, value = word.partition("=")
        words.setdefault(key, value)  # the comment, which the user may fill, comes last
    restarts = words.get("Restarts", "0")
    return Allocated(
        words.get("JobState", ""), int(restarts) if restarts.isdecimal() else 0, words.get("BatchHost", "")
    )


def patiently(
    question: Callable[[], Allocated | None], seconds: float, tell: Callable[[str], None]
) -> Allocated | None:
    """Ask until the controller answers; it may be restarted under running jobs.

    Raises:
        ControllerAway: no answer within so many seconds.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return question()
        except ControllerAway as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                tell(f"{error.wrong}; asking again for {seconds:.0f} s")
            told = True
        time.sleep(2.0)


def requeue(number: str, exclude: Sequence[str] = (), ask: Run = run) -> str:
    """Put a running job back into the queue, not on these nodes; return the reason where Slurm refuses, or nothing."""
    answer = ask(["scontrol", "requeue", number])
    if answer.code == 0 and exclude:
        # Only a job that is not running takes another list of nodes: it is completing from here on.
        exclude_nodes(number, exclude, ask)
    return _refusal(answer)


def exclude_nodes(number: str, nodes: Sequence[str], ask: Run = run) -> str:
    """Have jobs that wait not start on these nodes; return the reason where Slurm refuses, or nothing."""
    return _refusal(ask(["scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}"]))


def _refusal(answer: Answer) -> str:
    return "" if answer.code == 0 else answer.error or answer.out.strip() or f"exit code {answer.code}"


def signal_batch(number: str, name: str, ask: Run = run) -> str:
    """Send a signal to the conductor of a job; return the reason where Slurm refuses, or nothing.

    Of a chain cancel the links that wait first: beside them scancel (22.05) takes the link that runs for one in a
    transitional state, and sends the signal again every five seconds.
    """
    answer = ask(["scancel", "--batch", f"--signal={name}", number])
    return answer.error if answer.code != 0 or answer.error else ""


def cancel_waiting(array: str, ask: Run = run) -> str:
    """Cancel the jobs of an array that wait in the queue; return the reason where Slurm refuses, or nothing."""
    answer = ask(["scancel", "--state=PENDING", array])
    return answer.error if answer.code != 0 or answer.error else ""


def cancel(number: str, ask: Run = run) -> str:
    """Cancel a job at once; return the reason where Slurm refuses, or nothing."""
    answer = ask(["scancel", number])
    return answer.error if answer.code != 0 or answer.error else ""
