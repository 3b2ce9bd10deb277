"""The time limit of the cluster's job that a run is part of, as far as a process of the job can know it."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_SECONDS_OF = (86400, 3600, 60, 1)
_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
"""Slurm's time left: [days-][hours:]minutes:seconds."""
_JOB = re.compile(r"\d+(_\d+)?")
_ANSWER_SECONDS = 20.0


def job_seconds_left(
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.time,
    ask: Callable[[str], str] | None = None,
) -> float | None:
    """Return the seconds until the job's time limit; None where there is no job, no limit, or no answer.

    From `SLURM_JOB_END_TIME` (Slurm 23.02 and later; seconds since 1970), or from `squeue`, which `ask` runs for a job.
    """
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit() and int(end) > 0:
        return int(end) - now()
    job = environ.get("SLURM_JOB_ID", "")
    if link := environ.get("SLURM_ARRAY_TASK_ID"):
        # The last job of an array has the array's number, which stands for all of them.
        job = f"{environ.get('SLURM_ARRAY_JOB_ID', '')}_{link}"
    return _parse((ask or _ask_slurm)(job)) if _JOB.fullmatch(job) else None


def _parse(left: str) -> float | None:
    """Return the seconds of Slurm's time left; None for UNLIMITED, NOT_SET and what else is no time."""
    found = _LEFT.fullmatch(left.strip())
    if found is None:
        return None
    return float(sum(int(part or 0) * seconds for part, seconds in zip(found.groups(), _SECONDS_OF, strict=True)))


def _ask_slurm(job: str) -> str:
    """Return the time left of a job, as `squeue` prints it; empty where it gives no answer."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True, cwd=Path("/")
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
