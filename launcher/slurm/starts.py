"""Starts of a job: requeues of Slurm's, successors that a job submits itself, or links of a chain.

All starts of a job share the number under which the run knows it (`job`), and their attempts are numbered on, so that
whatever an earlier start still writes is refused as an older attempt's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from launcher.environment import RESTARTS_PER_START
from launcher.slurm.spec import JobSpec

VARIABLE = "PALIMPSEST_JOB_START"
"""Variable that tells the agents which start they belong to."""


@dataclass(frozen=True)
class JobStart:
    """One start of a job."""

    job: str
    """Number of the job as its run knows it: that of its first start, or of the chain's array."""
    index: int
    """Starts before this one."""
    number: str
    """Number of this start for Slurm's commands, `ARRAY_LINK` for a link of a chain."""
    requeues: int
    """Times that Slurm has requeued this number."""

    @property
    def first_attempt(self) -> int:
        """Number of the first attempt of this start."""
        return self.index * RESTARTS_PER_START


def job_start(spec: JobSpec, environ: Mapping[str, str], successor_of: Sequence[str] = ()) -> JobStart:
    """Return this start of a job from Slurm's variables.

    `successor_of` holds the arguments of a batch script that its predecessor has submitted: the number of the first
    job, and how many starts there were.
    """
    number, requeues = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0)
    if spec.chain is not None:
        # The last link has the number of the array, which stands for all of them in Slurm's commands.
        array, link = environ["SLURM_ARRAY_JOB_ID"], int(environ["SLURM_ARRAY_TASK_ID"])
        return JobStart(array, link - 1, f"{array}_{link}", requeues)
    if successor_of:
        first, index = successor_of
        return JobStart(first, int(index), number, requeues)
    return JobStart(number, requeues, number, requeues)


def successor_arguments(start: JobStart) -> tuple[str, str]:
    """Return the arguments of the batch script of the start after this one, for a job that submits it itself."""
    return start.job, str(start.index + 1)


def to_text(start: JobStart) -> str:
    """Return a start as the value of `VARIABLE`."""
    return json.dumps(asdict(start))


def from_text(text: str) -> JobStart:
    """Return the start in the value of `VARIABLE`."""
    return JobStart(**json.loads(text))
