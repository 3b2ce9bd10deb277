"""Sinks of a run's records: the terminal, JSON lines, TensorBoard, wandb, and a plot of the loss.

One record per step and one per evaluation, written by rank 0 alone. Over restarts each step stands once: what lies
beyond the step that a run resumes at is cut from the JSON lines, hidden in TensorBoard, and the wandb run goes on
under the same name.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from engine.atomic import write_atomically
from engine.config.schema.run import RunConfig
from engine.logs import logger
from engine.output import write_all
from engine.redact import redacted
from engine.train import records, wandb_files
from engine.train.console import Terminal
from engine.train.plot import PLOT, Plot
from engine.train.records import METRICS, Record
from engine.train.records import read_metrics as read_metrics

_log = logger(__name__)


class Sink(Protocol):
    """One destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl` in the run folder: one record per line, written without a buffer."""

    def __init__(self, folder: Path, resumed_at: int, num_rollbacks: int = 0) -> None:
        self._file = (folder / METRICS).open("ab", buffering=0)
        records.cut(folder, resumed_at, num_rollbacks)

    def write(self, record: Record) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            write_all(self._file.fileno(), (json.dumps(_finite(record)) + "\n").encode())
        except OSError:
            self._file.truncate(end)  # a part of a line would stand before the next one
            raise

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under `tensorboard/` in the run folder, one file per start.

    TensorBoard reads the files in the order of their names, and each start hides the steps beyond the one that it
    resumes at in the files before. torch's writer puts the clock into the name, and a restart may come to a node
    whose clock is behind; here a new name follows all that are there.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._Event, self._Summary = Event, Summary
        self._writer = RecordWriter(_next_event_file(folder / "tensorboard").open("xb"))
        # the version event that TensorBoard's readers expect first
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard discards what it has read of this step and later ones: a resumed run repeats them.
        self._write(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in _finite(record).items() if name != "step"}
        values = [self._Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(self._Event(step=int(record["step"]), summary=self._Summary(value=values)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()  # handed to the system: a killed run loses no step that it resumes behind


class Wandb:
    """A wandb run whose id stays with the run folder, so that a restart continues it.

    Offline, rows from the step that the run resumes at on are cut, and what `metrics.jsonl` has of the steps behind the
    last row that stays is written again: that row may lack what came after it was written (an evaluation that a signal
    put off), and a killed process loses rows. Online, the server keeps the first row that it was sent for a step.
    """

    def __init__(self, config: RunConfig, resumed_at: int) -> None:
        import wandb

        self._wandb = wandb
        again: list[Record] = []
        if config.logging.wandb == "offline":
            last_kept = wandb_files.cut(config.folder, _wandb_id(config.folder), resumed_at)
            again = list(records.records_from(config.folder, last_kept + 1))
        arguments, sys.argv = sys.argv, redacted(sys.argv)  # wandb records the command line
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                name=config.name,
                id=_wandb_id(config.folder),
                # offline, wandb ignores it: the files are joined by their id when they are synced
                resume="allow" if config.logging.wandb == "online" else None,
                mode=config.logging.wandb if config.logging.wandb != "off" else "disabled",
                dir=str(config.folder),
                config=redacted(config.model_dump(mode="json")),
                # wandb would else wrap standard output and error, which `engine.output` has done already.
                settings=wandb.Settings(console="off", silent=True),
            )
        finally:
            sys.argv = arguments
        for record in again:
            self.write(record)

    def write(self, record: Record) -> None:
        numbers = {name: value for name, value in _finite(record).items() if name != "step"}
        self._run.log(numbers, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process still writes: what comes after (a rollback) may cut the file


class Tracker:
    """A sink whose errors must not end the run: after the first it is left out, with a warning."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name, self._sink = name, None
        self._attempt("start", lambda: setattr(self, "_sink", make()))

    def write(self, record: Record) -> None:
        self._attempt("take a record", lambda: self._sink and self._sink.write(record))

    def close(self) -> None:
        self._attempt("be closed", lambda: self._sink and self._sink.close())

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        # Not a narrower class: trackers raise classes of their own, and none is worth a training run.
        except Exception as error:
            _log.warning("%s cannot %s and is left out: %s", self._name, what, error)
            self._sink = None


class Metrics:
    """All sinks of a run; none on ranks other than 0. Records that a sink cannot write are dropped with one warning."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._failed: set[int] = set()

    def write(self, record: Record) -> None:
        for number, sink in enumerate(self._sinks):
            self._attempt(number, partial(sink.write, record))

    def close(self) -> None:
        for number, sink in enumerate(self._sinks):
            self._attempt(number, sink.close)

    def _attempt(self, number: int, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if number not in self._failed:
                self._failed.add(number)
                # trackers never raise
                what = "standard output" if isinstance(self._sinks[number], Terminal) else METRICS
                why = error.strerror or error
                _log.warning("%s cannot be written (%s): records are dropped until it can", what, why)


def open_metrics(config: RunConfig, resumed_at: int, num_rollbacks: int = 0) -> Metrics:
    """Open the sinks that a configuration asks for. `num_rollbacks` are those of the run so far. Rank 0 only."""
    sinks: list[Sink] = [
        JsonLines(config.folder, resumed_at, num_rollbacks),
        Terminal(config),
    ]
    if config.logging.tensorboard:
        tensorboard = Tracker("TensorBoard", lambda: TensorBoard(config.folder, resumed_at))
        # The records of rollbacks that `records.cut` has kept beyond this step: START hides them in the older files.
        for rollback in records.records_from(config.folder, resumed_at + 1):
            tensorboard.write(rollback)
        sinks.append(tensorboard)
    if config.logging.wandb != "off":
        sinks.append(Tracker("wandb", lambda: Wandb(config, resumed_at)))
    if config.logging.plot:
        sinks.append(Tracker(PLOT, lambda: Plot(config.folder, METRICS, config.name, run_stage_borders(config))))
    return Metrics(sinks)


def run_stage_borders(config: RunConfig) -> dict[int, str]:
    """Return the name of each run stage but the first, by the number of steps that come before it."""
    ends = itertools.accumulate(run_stage.num_steps for run_stage in config.stages)
    return {end: later.name for end, later in zip(ends, config.stages[1:], strict=False)}


def is_evaluation(record: Record) -> bool:
    """Return True for the record of an evaluation, even if its loss was not finite."""
    return any(name.startswith("validation_") for name in record)


def _finite(record: Record) -> Record:
    return {name: value for name, value in record.items() if math.isfinite(value)}  # JSON has no NaN


def _next_event_file(folder: Path) -> Path:
    """Return a path whose name follows those of all of TensorBoard's files in the folder; make the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in folder.iterdir()]
    newest = max((int(number[1]) for number in numbers if number), default=0)
    # 10 digits, as torch's writer has: names then sort as their numbers do.
    number = max(newest + 1, int(time.time()))
    return folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"


def _wandb_id(folder: Path) -> str:
    """Return an id that stays with the run folder; made once, when the folder is new."""
    path = folder / "wandb-id"
    if not path.exists():
        import uuid

        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
