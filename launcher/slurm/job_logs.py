"""Logs of a job's ranks: which file is which rank's, on which node, and where the first error is.

The conductor notes the nodes of each attempt (`attempts.jsonl`), and ranks of a node are numbered in a row, so a rank's
node follows from its number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import outcome
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from launcher.slurm.spec import ATTEMPTS_FILE, LOGS

LARGEST_TAIL_BYTES = 1 << 18
"""Most bytes that are read from the end of a log."""
MARKS = ("Traceback (most recent call last)", "palimpsest train", "Error:", "error:")
"""Texts with which a rank's error begins."""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of a job, as its conductor has noted it."""

    number: int
    nodes: tuple[str, ...]
    ranks_per_node: int
    layout: str
    began: float
    ended: float | None = None
    code: int | None = None
    words: str = ""
    step: int = 0

    @property
    def num_ranks(self) -> int:
        """Ranks of the world."""
        return len(self.nodes) * self.ranks_per_node

    def node_of(self, rank: int) -> str:
        """Return the node of a rank."""
        return self.nodes[rank // self.ranks_per_node]


def attempts(job_folder: Path) -> list[AttemptRecord]:
    """Return the attempts of a job, the newest last; lines that cannot be read are left out."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = (job_folder / ATTEMPTS_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            found.setdefault(record["attempt"], {}).update(record)
        except (ValueError, KeyError, TypeError):  # a line that is being written
            continue
    return [
        AttemptRecord(
            number,
            tuple(record["nodes"]),
            record["ranks_per_node"],
            record["layout"],
            record["began"],
            record.get("ended"),
            record.get("code"),
            record.get("words", ""),
            record.get("step", 0),
        )
        for number, record in sorted(found.items())
        if "nodes" in record
    ]


def log_of(job_folder: Path, attempt: int, rank: int) -> Path:
    """Return the log of one rank in one attempt."""
    return job_folder / LOGS / f"rank-{rank}.{attempt}.log"


def selected(attempt: AttemptRecord, rank: int | None, node: str | None) -> list[int]:
    """Return the ranks to show: one, those of a node, or all."""
    ranks = range(attempt.num_ranks) if rank is None else [rank]
    return [number for number in ranks if number < attempt.num_ranks and node in (None, attempt.node_of(number))]


def tail(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of a log; none where it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - LARGEST_TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-num_lines:]


def first_error(run_folder: Path, job_folder: Path, attempt: AttemptRecord) -> tuple[int | None, str]:
    """Return (rank, error) of an attempt that failed: the outcome's, or that of the log which was first to tell of one.

    The rank is None where nobody knows, and the error is empty where there is none.
    """
    said = outcome.read(run_folder)
    if said is not None and said.attempt == attempt.number and said.code not in (EXIT_DONE, EXIT_REQUEUE):
        return said.rank, said.error
    if attempt.code in (EXIT_DONE, EXIT_REQUEUE):
        return None, ""
    found = []
    for rank in range(attempt.num_ranks):
        path = log_of(job_folder, attempt.number, rank)
        lines = tail(path, 200)
        first = next((index for index, line in enumerate(lines) if any(mark in line for mark in MARKS)), None)
        if first is not None:
            # A rank that fails writes no more: the log that was left first is that of the first to fail.
            found.append((path.stat().st_mtime, rank, "\n".join(lines[first:])))
    if found:
        _, rank, error = min(found)
        return rank, error
    return None, attempt.words


class Follower:
    """New lines of the logs of the ranks that are shown, attempt after attempt."""

    def __init__(self, job_folder: Path, rank: int | None, node: str | None) -> None:
        self._job_folder, self._rank, self._node = job_folder, rank, node
        self._read: dict[Path, int] = {}

    def new_lines(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield (attempt, rank, node, line) of all whole lines since the last call."""
        for attempt in attempts(self._job_folder):
            for rank in selected(attempt, self._rank, self._node):
                path = log_of(self._job_folder, attempt.number, rank)
                for line in self._lines(path):
                    yield attempt.number, rank, attempt.node_of(rank), line

    def _lines(self, path: Path) -> list[str]:
        begin = self._read.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
        except OSError:
            return []
        # A line that is being written is left for the next call.
        whole, newline, _ = data.rpartition(b"\n")
        self._read[path] = begin + len(whole) + len(newline)
        return whole.decode("utf-8", errors="replace").split("\n") if newline else []
