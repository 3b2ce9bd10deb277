"""Status of a run, read from its folder alone, while the run may go on.

Reading costs the same however long a run is: its newest records are found by bisection (`engine.train.records`), and
nothing is locked, so the run notices nothing. Nothing here imports torch.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import outcome
from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.config import save
from engine.config.load import load_run
from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError
from engine.outcome import Outcome
from engine.run_folder import FILE as RUNNING
from engine.run_folder import FolderUser, current_user
from engine.train import records
from engine.train.records import METRICS

State = Literal["running", "done", "appended", "stopped", "failed", "ended", "new"]
"""`appended`: done, and a run stage was appended since. `stopped`: a signal came, the run was saved and wants to be
started again. `ended`: no process uses the folder, and none has said why (it was killed, or the node was lost). `new`:
nothing has been trained or said yet."""
RECENT_STEPS = 50
"""Number of newest steps whose median is the speed."""
WINDOW_STEPS = 1000
"""Steps over which evaluations are counted for the time left: several of them."""
MAX_DEPTH = 3
"""Levels below a folder on which run folders are looked for."""
_MARKS = (save.FILE, METRICS, outcome.FILE, RUNNING)


@dataclass(frozen=True)
class RunStatus:
    """Status of one run. A field is None where the folder does not tell."""

    folder: Path
    name: str | None
    state: State
    step: int
    """Steps done over all run stages."""
    num_steps: int | None
    run_stage: str | None
    """Name of the run stage that the next step belongs to, and its number among all of them."""
    run_stage_number: int | None
    num_run_stages: int | None
    loss: float | None
    validation_loss: float | None
    validation_step: int | None
    tokens: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    """Seconds of training left at the newest steps' speed, evaluations included; of a run that stands, once it runs."""
    seconds_since_record: float | None
    checkpoint: Path | None
    checkpoint_step: int | None
    user: FolderUser | None
    outcome: Outcome | None
    """Outcome of the last attempt; None while it runs, or where it was killed."""
    config_problem: str | None
    """Reason why the configuration in the folder cannot be read: `num_steps` and what follows from it are unknown."""


def is_run_folder(path: Path) -> bool:
    """Return True if a run has written to the folder."""
    return any((path / name).is_file() for name in _MARKS) or (path / CHECKPOINTS).is_dir()


def run_folders(path: Path) -> list[Path]:
    """Return the run folder `path`, or those up to `MAX_DEPTH` levels below it, by name; none is searched itself.

    Raises:
        ConfigError: there is none.
    """
    if is_run_folder(path):
        return [path]
    found = sorted(_below(path, MAX_DEPTH)) if path.is_dir() else []
    if found:
        return found
    wrong = "holds no run" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
    raise ConfigError(
        f"{path} {wrong}",
        f"a run folder (it has {save.FILE} and {METRICS}), a folder of run folders, or a run file",
        "check the path; `folder` in the run file names the run folder",
    )


def read_status(folder: Path, run_file: RunConfig | None = None) -> RunStatus:
    """Return the status of the run in `folder`; whatever is missing or damaged there is None.

    `run_file` is the run file as it is now, where it is known: it may have stages that no start has seen yet."""
    config, problem = (run_file, None) if run_file is not None else _read_config(folder)
    newest = records.last_step(folder)
    # A window of records, not the file: a run of a million steps is read as fast as a new one.
    found = list(records.records_from(folder, max(newest - WINDOW_STEPS, 0)))
    steps = [record for record in found if "step_seconds" in record]
    validation = next((record for record in reversed(found) if "validation_loss" in record), {})
    checkpoint = next(iter(committed(folder / CHECKPOINTS)), None)
    checkpoint_step = None if checkpoint is None else step_of(checkpoint)
    last = steps[-1] if steps else {}
    step = last.get("step", checkpoint_step or 0)
    speed = _speed(steps)
    user, ended = current_user(folder), outcome.read(folder)
    number, stage = _run_stage(config, step)
    return RunStatus(
        folder=folder,
        name=config.name if config else None,
        state=_state(user, ended, config, started=bool(step) or _was_used(folder)),
        step=step,
        num_steps=config.num_steps if config else None,
        run_stage=stage,
        run_stage_number=number,
        num_run_stages=len(config.stages) if config else None,
        loss=last.get("loss"),
        validation_loss=validation.get("validation_loss"),
        validation_step=validation.get("step"),
        tokens=last.get("tokens"),
        tokens_per_second=speed,
        seconds_left=_seconds_left(config, last, speed, found),
        seconds_since_record=_age(folder / METRICS),
        checkpoint=checkpoint,
        checkpoint_step=checkpoint_step,
        user=user,
        outcome=ended,
        config_problem=problem,
    )


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of the newest start of a run. Raises `ConfigError` where it cannot be read."""
    return load_run(folder / save.FILE)


def _read_config(folder: Path) -> tuple[RunConfig | None, str | None]:
    try:
        return read_config(folder), None
    except ConfigError as error:
        return None, error.wrong


def _below(path: Path, levels: int) -> Iterator[Path]:
    try:
        entries = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:  # a folder that must not be read, or one that is being removed
        return
    for entry in entries:
        if is_run_folder(entry):
            yield entry
        elif levels > 1:
            yield from _below(entry, levels - 1)


def _state(user: FolderUser | None, ended: Outcome | None, config: RunConfig | None, started: bool) -> State:
    if user is not None:
        return "running"
    if ended is None:
        return "ended" if started else "new"
    if ended.code == EXIT_DONE:
        return "done" if config is None or ended.ends(config.num_steps) else "appended"
    return "stopped" if ended.code == EXIT_REQUEUE else "failed"


def _was_used(folder: Path) -> bool:
    """Return True if a start took the folder and was killed: whoever ends in order takes its name away."""
    try:
        return (folder / RUNNING).stat().st_size > 0
    except OSError:
        return False


def _run_stage(config: RunConfig | None, step: int) -> tuple[int | None, str | None]:
    """Return number (from 1) and name of the run stage of the step after `step`; of the last one at the end."""
    if config is None:
        return None, None
    ends = list(itertools.accumulate(stage.num_steps for stage in config.stages))
    # Ends 10 and 30: step 9 -> 0, step 10 -> 1 (its next step is the second's first), step 30 -> 2, cut to 1.
    index = min(bisect.bisect_right(ends, step), len(ends) - 1)
    return index + 1, config.stages[index].name


def _speed(steps: list[dict[str, Any]]) -> float | None:
    """Tokens per second of a usual recent step: a median, so that a start's first step (compilation) does not count."""
    speeds = [record["tokens_per_second"] for record in steps[-RECENT_STEPS:] if "tokens_per_second" in record]
    return statistics.median(speeds) if speeds else None


def _seconds_left(
    config: RunConfig | None, last: dict[str, Any], speed: float | None, found: list[dict[str, Any]]
) -> float | None:
    within = math.fsum(record.get("step_seconds", 0.0) for record in found)
    if config is None or not speed or not within or "tokens" not in last:
        return None
    # samples * tokens per sample, over all run stages
    total = sum(stage.batches.samples(stage.num_steps) * stage.sequence_length for stage in config.stages)
    between = math.fsum(record.get("validation_seconds", 0.0) for record in found)
    # Each second within steps costs `between / within` seconds of evaluation on top.
    return max(total - last["tokens"], 0) / speed * (1 + between / within)


def _age(path: Path) -> float | None:
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None
