"""Runs of an experiment: each a process of its own, forked from one that has torch and DeepSpeed loaded.

A process trains one run only, because DeepSpeed keeps global state; what a run computes depends on its configuration
alone, so it does not matter how many train side by side.
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.contest import Worker

TIMEOUT_SECONDS = 7200.0
LOG = "log.txt"
Tree = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A run to be trained. `begins_at` is a checkpoint of another run that it goes on from; None means at step 0."""

    name: str
    tree: Tree
    begins_at: Path | None = None


def train_all(runs: Sequence[Planned], processes: int) -> dict[str, float]:
    """Train runs, so many at a time; return the CPU seconds of each by its name.

    Raises:
        ContestFailed: one of them failed.
    """
    with ThreadPoolExecutor(processes) as pool:
        return dict(zip((run.name for run in runs), pool.map(_train, runs), strict=True))


def _train(run: Planned) -> float:
    with tempfile.TemporaryDirectory() as meeting:  # the file at which the ranks of a world, here one, meet
        worker = Worker(run.name, "forkserver", {}, _rank, run.tree, run.begins_at, meeting)
        try:
            seconds = worker.receive(TIMEOUT_SECONDS)
        finally:
            worker.end()
    print(f"{run.name}: {seconds:.0f} CPU seconds", flush=True)
    return seconds


def _rank(connection: Connection, tree: Tree, begins_at: Path | None, meeting: str) -> None:
    from engine.config.load import parse_run
    from engine.train.branch import branch

    config = parse_run(tree, tree["name"])
    if begins_at is not None:
        branch(begins_at, config.folder)
    config.folder.mkdir(parents=True, exist_ok=True)
    with (config.folder / LOG).open("w", encoding="utf-8") as log:
        _redirect(log.fileno(), partial(_fit, config, meeting))
    used = resource.getrusage(resource.RUSAGE_SELF)
    connection.send(used.ru_utime + used.ru_stime)


def _redirect(descriptor: int, action: Any) -> None:
    """Call an action with all that it prints going to a file, what its libraries print included."""
    before = os.dup(1), os.dup(2)
    try:
        for target in (1, 2):
            os.dup2(descriptor, target)
        with contextlib.redirect_stdout(os.fdopen(os.dup(descriptor), "w")):
            action()
    finally:
        for target, descriptor in zip((1, 2), before, strict=True):
            os.dup2(descriptor, target)


def _fit(config: Any, meeting: str) -> None:
    from bench.ranks import join
    from engine.config.resolve import resolve
    from engine.heartbeat import Heartbeat
    from engine.train.build import join_groups
    from engine.train.signals import StopSignals
    from engine.train.trainer import Trainer

    environment, device = join(meeting, 0, 1)
    groups = join_groups(config, resolve(config, 1), 0)
    trainer = Trainer(config, groups, environment, device, StopSignals(), Heartbeat(None, 0))
    try:
        trainer.fit()
    finally:
        trainer.close()
