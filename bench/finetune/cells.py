"""Cells of the benchmark: one training of one side, in a process of its own, kept in a file so that it is run once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from bench.contest import Worker
from bench.finetune.ablations import switch_of, train_ablated
from bench.finetune.encoder import Encoder
from bench.finetune.ours import train_ours
from bench.finetune.relations import Row
from bench.finetune.sets import TaskSet, few
from bench.finetune.theirs import train_theirs
from engine.atomic import write_atomically

Side = Literal["ours", "Trainer", "ours from random weights"]
TIMEOUT_SECONDS = 7200.0


@dataclass(frozen=True)
class Cell:
    """One training: a task set, a side, a seed, and the training rows. None means all."""

    task: TaskSet
    side: Side
    seed: int
    num_rows: int | None = None
    switch: str | None = None
    """Guard against overfitting, of `bench.finetune.ablations`. None means the plain recipe."""

    @property
    def name(self) -> str:
        """Name of its file and folder."""
        rows = "all" if self.num_rows is None else str(self.num_rows)
        parts = [self.task.name, self.side, rows, *([self.switch] if self.switch else []), f"seed-{self.seed}"]
        return "-".join(parts).replace(" ", "-")


@dataclass(frozen=True)
class Result:
    """Figures of a cell: the measure on the test rows, and what it took from the rows to the written model."""

    measures: dict[str, float]
    cpu_seconds: float
    wall_seconds: float
    train_rows: int
    test_rows: int


class Cells:
    """Cells below a folder; those whose result is there, for the same settings, are not run again."""

    def __init__(self, data: Path, folder: Path, encoder: Encoder, limit: int | None = None) -> None:
        """Keep where everything is. `limit` cuts the rows of each half: for a look, its figures mean little."""
        self._data, self._folder, self._encoder, self._limit = data, folder, encoder, limit
        self._weights = _hash_of(encoder.pretrained), _hash_of(encoder.random)

    def run(self, cells: Sequence[Cell], processes: int) -> dict[Cell, Result]:
        """Return the result of each cell. Raises `ContestFailed` where one of them fails."""
        with ThreadPoolExecutor(processes) as pool:
            return dict(zip(cells, pool.map(self._result, cells), strict=True))

    def _result(self, cell: Cell) -> Result:
        file = self._folder / f"{cell.name}.json"
        # a cell is run again when its recipe, its start or the cut of its rows is another one
        settings = asdict(cell) | {"weights": self._weights, "limit": self._limit}
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["settings"] == json.loads(json.dumps(settings)):
                return Result(**kept["result"])
        result = self._run(cell)
        write_atomically(file, json.dumps({"settings": settings, "result": asdict(result)}, indent=1) + "\n")
        measure = result.measures[cell.task.measure]
        print(f"{cell.name}: {cell.task.measure} {measure:.4f}, {result.cpu_seconds:.0f} CPU s", flush=True)
        return result

    def _run(self, cell: Cell) -> Result:
        train, test = cell.task.rows(self._data)
        if self._limit is not None:  # of the first rows alone, training might lack a label that the test has
            train, test = few(train, self._limit, seed=0), test[: self._limit]
        if cell.num_rows is not None:
            train = few(train, cell.num_rows, cell.seed)
        folder = self._folder / cell.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = tuple(str(_write(rows, folder / name)) for rows, name in ((train, "train.jsonl"), (test, "test.jsonl")))
        start = self._encoder.random if cell.side.endswith("random weights") else self._encoder.pretrained
        worker = Worker(cell.name, "forkserver", {"OMP_NUM_THREADS": "1"}, _train, cell, str(start), files, len(train))
        try:
            measures, cpu, wall = worker.receive(TIMEOUT_SECONDS)
        finally:
            worker.end()
        shutil.rmtree(folder, ignore_errors=True)
        return Result(measures, cpu, wall, len(train), len(test))


def _train(connection: Connection, cell: Cell, start: str, files: tuple[str, str], num_rows: int) -> None:
    # What either side imports is not counted: it is the same for one cell and for a thousand.
    import sklearn.metrics  # noqa: F401
    from transformers import Trainer  # noqa: F401

    folder = Path(files[0]).parent
    # what a side prints goes beside its rows
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    run = folder / "run"
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if cell.switch is not None:
        measures = train_ablated(cell.task, start, files, run, cell.seed, switch_of(cell.switch))
    else:
        train = train_theirs if cell.side == "Trainer" else train_ours
        measures = train(cell.task.for_rows(num_rows), start, files, run, cell.seed)
    used, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    numbers = {name: value for name, value in measures.items() if isinstance(value, float)}
    connection.send((numbers, used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, wall))


def _write(rows: Sequence[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _hash_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
