"""The processes of one launch, found by a mark in their environment, whichever process is their parent now.

Launchers put processes between us and the ranks and may vanish first, so parentage tells nothing. Every process of a
launch inherits `PALIMPSEST_JOB=<unique name>`, and Linux shows it in `/proc/PID/environ`. A rank is a marked process
that has RANK and whose parent has not: data loader workers inherit RANK, too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.variables import JOB, RUN_FOLDER

PROC = Path("/proc")
_JOB = f"{JOB}=".encode()


@dataclass(frozen=True)
class Process:
    """One live process of the launch; `global_rank` is None for the launchers in between."""

    pid: int
    parent: int
    global_rank: int | None


def marked(job: str) -> list[Process]:
    """Return every live process of this user that was started with this job's name, this process excepted."""
    return with_variable(f"{JOB}={job}")


def of_run(folder: Path) -> list[Process]:
    """Return every live process of this user for any job that was launched in a run folder."""
    return with_variable(f"{RUN_FOLDER}={folder.absolute()}")


def with_variable(variable: str) -> list[Process]:
    """Return every live process of this user that was started with this `NAME=value`, this process excepted."""
    return [process for entry in _others() if (process := _read(entry, variable.encode())) is not None]


def by_job() -> dict[str, list[int]]:
    """Return the process ids of this user that belong to jobs of `palimpsest launch`, by job, this process excepted."""
    found: dict[str, list[int]] = {}
    for entry in _others():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        jobs = [value.partition(b"=")[2].decode(errors="replace") for value in variables if value.startswith(_JOB)]
        if jobs:
            found.setdefault(jobs[0], []).append(int(entry.name))
    return found


def _others() -> Iterator[Path]:
    """Yield `/proc/PID` of every process but this one."""
    own = os.getpid()
    return (entry for entry in PROC.iterdir() if entry.name.isdigit() and int(entry.name) != own)


def ranks(processes: list[Process]) -> list[Process]:
    """Return the ranks among the processes of a launch, by global rank."""
    with_rank = {process.pid for process in processes if process.global_rank is not None}
    # A data loader worker's parent is a rank, or another worker: both have RANK.
    tops = [process for process in processes if process.pid in with_rank and process.parent not in with_rank]
    return sorted(tops, key=lambda process: process.global_rank or 0)


def send(processes: list[Process], number: signal.Signals) -> None:
    """Send a signal to each process that still lives."""
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


def state_of(pid: int) -> str:
    """Return the kernel's letter for a process's state (R, S, D, T, ...); X where it is gone."""
    try:
        return _state_and_parent(PROC / str(pid))[0]
    except (OSError, ValueError):
        return "X"


def _state_and_parent(entry: Path) -> tuple[str, str]:
    # the name in parentheses may hold blanks and parentheses: what follows the last one is state, parent, ...
    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, parent


def _read(entry: Path, variable: bytes) -> Process | None:
    """Return the process behind `/proc/PID`; None where it is another user's, lacks this variable, or is gone."""
    try:
        variables = (entry / "environ").read_bytes().split(b"\0")
        if variable not in variables:
            return None
        state, parent = _state_and_parent(entry)
    except (OSError, ValueError):
        return None
    # A zombie has ended and only waits for its parent to read the exit code; signals do nothing to it.
    if state in "ZX":
        return None
    own = [value[5:] for value in variables if value.startswith(b"RANK=")]
    return Process(int(entry.name), int(parent), int(own[0]) if own and own[0].isdigit() else None)
