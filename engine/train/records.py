"""The records of a run in `metrics.jsonl`: one JSON object per line, in ascending order of `step`.

Nothing that a run does while it goes on, or when it starts, reads the whole file: a step is found by bisection over
byte positions, so the cost does not grow with the run's length. Lines that are no record (blank, or cut off by a
kill) are passed over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.checkpoint.storage import Location

Record = dict[str, float | int]
"""Numbers by name; `step` counts the steps done. A number that is not finite is left out of the file."""

METRICS = "metrics.jsonl"
VALIDATION_LOSS = "validation_loss"
INITIAL = "initial_"
"""Beginning of the names of what is measured before a run stage trains on its data."""
INITIAL_LOSS = f"{INITIAL}loss"
"""Name of a validation loss before the first step of a run stage."""


class _Line(NamedTuple):
    """A record and the position behind its line."""

    record: dict[str, Any]
    end: int


def read_metrics(folder: Location) -> list[dict[str, Any]]:
    """Return all records of a run folder, oldest first; none where there is no file."""
    try:
        with (folder / METRICS).open("rb") as file:
            return [record for line in file if (record := _parse(line)) is not None]
    except FileNotFoundError:
        return []


def records_from(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the records of `step` and of all later steps."""
    try:
        file = (folder / METRICS).open("rb")
    except FileNotFoundError:
        return
    with file:
        start, _ = _find(file, step)
        file.seek(start)
        while (line := _next_line(file)) is not None:
            yield line.record


def records_of(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the records of one step."""
    found = []
    for record in records_from(folder, step):
        if record["step"] != step:
            break
        found.append(record)
    return found


def last_step(folder: Path) -> int:
    """Return the step of the newest record; 0 where there is none."""
    try:
        with (folder / METRICS).open("rb") as file:
            _, newest = _find(file, math.inf)
    except FileNotFoundError:
        return 0
    return newest["step"] if newest is not None else 0


def metric_of(folder: Path, steps: Iterable[int], name: str) -> dict[int, float]:
    """Return the metric `name` by step, of those of `steps` that have one."""
    return {step: record[name] for step in steps for record in records_of(folder, step) if name in record}


def cut(folder: Path, resumed_at: int, num_rollbacks: int) -> None:
    """Remove the records of the steps beyond `resumed_at`, and what a kill left of a line.

    A record of a rollback tells of samples that the run leaves out from then on, so it stays where the state that the
    run resumes from counts that rollback among its `num_rollbacks`; it then belongs to the next step.
    """
    with (folder / METRICS).open("r+b") as file:
        start, newest = _find(file, resumed_at + 1)
        file.seek(start)
        kept = b""
        while (line := _next_line(file)) is not None:
            if line.record.get("rollback", math.inf) <= num_rollbacks:
                # moved to the next step, so that the file stays in ascending order
                kept += json.dumps(line.record | {"step": resumed_at + 1}).encode() + b"\n"
        # A kill between a line and its newline leaves a record that parses: end that line first.
        if newest is not None and not _ends_a_line(file, start):
            kept = b"\n" + kept
        file.seek(start)
        file.write(kept)
        file.truncate()


def _find(file: BinaryIO, step: float) -> tuple[int, dict[str, Any] | None]:
    """Return the position of the first record of `step` or a later one, and the record before it.

    The position is the end of the last record where there is no such record.

    Invariant: every record before `low` is of an earlier step, and every one that starts at `high` or behind is not.
    """
    low, high, before = 0, file.seek(0, os.SEEK_END), None
    while low < high:
        middle = (low + high) // 2
        # From one byte earlier, so that a line that starts exactly at `middle` is not skipped: lines of 10 bytes and
        # middle = 20 read the newline at 19 and then the line at 20; middle = 21 reads on to the line at 30.
        file.seek(max(0, middle - 1))
        if middle:
            file.readline()  # to the first line that starts at `middle` or behind it
        line = _next_line(file)
        if line is None or line.record["step"] >= step:
            high = middle
        else:
            low, before = line.end, line.record
    return low, before


def _next_line(file: BinaryIO) -> _Line | None:
    """Return the next line that is a record; None at the end of the file."""
    while text := file.readline():
        if (record := _parse(text)) is not None:
            return _Line(record, file.tell())
    return None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        record["step"] = int(record["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # a kill or a full disk leaves any bytes
        return None
    return record


def _ends_a_line(file: BinaryIO, position: int) -> bool:
    file.seek(position - 1)
    return file.read(1) == b"\n"
