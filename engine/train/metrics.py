"""Where a run's numbers go: the terminal, JSON lines, TensorBoard, wandb, and a plot of the loss.

One record per step and one per evaluation, written by rank 0 alone. Over restarts each step stands once: what lies
beyond the step that a run resumes at is cut from the JSON lines, hidden in TensorBoard, and the wandb run goes on
under the same name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint.storage import Place
from engine.config.schema.run import RunConfig
from engine.logs import logger
from engine.train import wandb_files
from engine.train.console import Terminal
from engine.train.plot import PLOT, Plot

Record = dict[str, float | int]
"""Numbers by name; `step` counts the steps done. One that is not finite is left out where it is written."""

METRICS = "metrics.jsonl"

_log = logger(__name__)


class Sink(Protocol):
    """One place where records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl` in the run folder: one record a line, handed to the system at once."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        path = folder / METRICS
        kept = [record for record in read_metrics(folder) if record["step"] <= resumed_at]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under `tensorboard/` in the run folder."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # handed to the system: a killed run loses no step that it resumes behind

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run whose id stays with the run folder, so that a restart continues it.

    Offline, rows beyond the step that the run resumes at are cut, and rows before it that were lost with a killed
    process are written again. Online, the server keeps the first row that it was sent for a step.
    """

    def __init__(self, config: RunConfig, resumed_at: int) -> None:
        import wandb

        self._wandb = wandb
        lost: list[Record] = []
        if config.logging.wandb == "offline":
            kept = wandb_files.cut(config.folder, _wandb_id(config.folder), resumed_at)
            lost = [record for record in read_metrics(config.folder) if record["step"] not in kept]
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=_wandb_id(config.folder),
            resume="allow" if config.logging.wandb == "online" else None,
            mode=config.logging.wandb if config.logging.wandb != "off" else "disabled",
            dir=str(config.folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        for record in lost:
            if record["step"] <= resumed_at:
                self.write(record)

    def write(self, record: Record) -> None:
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process still writes: what comes after (a rollback) may cut the file


class Tracker:
    """A sink whose trouble, whatever it is, must not cost the run: it is left out from then on, with a warning."""

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
        except Exception as error:
            _log.warning("%s cannot %s and is left out: %s", self._name, what, error)
            self._sink = None


class Metrics:
    """All sinks of a run; holds none on ranks other than 0."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        known = {name: value for name, value in record.items() if math.isfinite(value)}  # JSON has no NaN
        for sink in self._sinks:
            sink.write(known)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_metrics(config: RunConfig, resumed_at: int) -> Metrics:
    """The sinks that a configuration asks for. Rank 0 only."""
    sinks: list[Sink] = [JsonLines(config.folder, resumed_at), Terminal(config.logging.every_steps, config.stages[0])]
    if config.logging.tensorboard:
        sinks.append(Tracker("TensorBoard", lambda: TensorBoard(config.folder, resumed_at)))
    if config.logging.wandb != "off":
        sinks.append(Tracker("wandb", lambda: Wandb(config, resumed_at)))
    if config.logging.plot:
        sinks.append(Tracker(PLOT, lambda: Plot(config.folder, METRICS, config.name)))
    return Metrics(sinks)


def read_metrics(folder: Place) -> list[dict[str, Any]]:
    """The records in a run folder's JSON lines, up to the first line that is none (a kill cuts the last one off)."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError):
            break
        records.append(record)
    return records


def _wandb_id(folder: Path) -> str:
    """An id that stays with the run folder; made once, when the folder is new."""
    path = folder / "wandb-id"
    if not path.exists():
        import uuid

        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
