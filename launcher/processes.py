"""The processes of one launch, found by a mark in their environment, whichever process is their parent now.

Launchers put processes between us and the ranks and may vanish first, so parentage tells nothing. Every process of a
launch inherits `PALIMPSEST_JOB=<unique name>`, and Linux shows it in `/proc/PID/environ`. A rank is a marked process
that has RANK and whose parent has not: data loader workers inherit RANK, too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.variables import JOB, RUN_FOLDER

YOUNG_SECONDS = 10.0
"""Seconds for which the environment of a new process may still change: it is that of its parent until its exec."""
AGAIN_SECONDS = 10.0
"""Seconds between two looks at the processes that are older than that and have no mark."""
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
    return [process for pid in _others() if (process := _read(pid, variable.encode())) is not None]


class Watch:
    """The processes of this user that were started with one `NAME=value`, for a look twice a second.

    To read every environment each time costs several percent of a core on a node with some hundred processes. What has
    been there for a while without the mark is therefore read again only now and then.
    """

    def __init__(self, variable: str) -> None:
        self._variable = variable.encode()
        self._unmarked: dict[int, float] = {}
        """Process without the mark -> time at which it was seen first."""
        self._next_whole_look = 0.0

    def look(self) -> list[Process]:
        """Return every live process with the mark, this process excepted.

        One that got its mark by an exec long after its start may be missing for `AGAIN_SECONDS`.
        """
        now = time.monotonic()
        whole = now >= self._next_whole_look
        if whole:
            self._next_whole_look = now + AGAIN_SECONDS
        found: list[Process] = []
        unmarked: dict[int, float] = {}
        for pid in _others():
            since = self._unmarked.get(pid, now)
            process = _read(pid, self._variable) if whole or now - since < YOUNG_SECONDS else None
            if process is None:
                unmarked[pid] = since
            else:
                found.append(process)
        self._unmarked = unmarked
        return found


def watch_job(job: str) -> Watch:
    """Return a watch over the processes that are started with this job's name."""
    return Watch(f"{JOB}={job}")


def by_job() -> dict[str, list[int]]:
    """Return the process ids of this user that belong to jobs of `palimpsest launch`, by job, this process excepted."""
    found: dict[str, list[int]] = {}
    for pid in _others():
        try:
            variables = _environment(pid).split(b"\0")
        except OSError:  # another user's, or gone
            continue
        jobs = [value.partition(b"=")[2].decode(errors="replace") for value in variables if value.startswith(_JOB)]
        if jobs:
            found.setdefault(jobs[0], []).append(pid)
    return found


def _others() -> Iterator[int]:
    """Yield the id of every process but this one."""
    own = os.getpid()
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own)


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
        return _state_and_parent(pid)[0]
    except (OSError, ValueError):
        return "X"


def _environment(pid: int) -> bytes:
    # unbuffered, and without a Path: this is read for every process of the node
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        return file.read()


def _state_and_parent(pid: int) -> tuple[str, str]:
    # the name in parentheses may hold blanks and parentheses: what follows the last one is state, parent, ...
    state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    return state, parent


def _read(pid: int, variable: bytes) -> Process | None:
    """Return a process; None where it is another user's, lacks this variable, or is gone."""
    try:
        environment = _environment(pid)
        # The bytes first: to split every environment of a node costs more than to read it.
        if variable not in environment or variable not in (variables := environment.split(b"\0")):
            return None
        state, parent = _state_and_parent(pid)
    except (OSError, ValueError):
        return None
    # A zombie has ended and only waits for its parent to read the exit code; signals do nothing to it.
    if state in "ZX":
        return None
    own = [value[5:] for value in variables if value.startswith(b"RANK=")]
    return Process(pid, int(parent), int(own[0]) if own and own[0].isdigit() else None)
