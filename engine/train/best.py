"""`best` in a run folder: a link to its best checkpoint, by `checkpoint.best_metric`, of those that are there.

It follows from `metrics.jsonl` and the committed checkpoints alone, and is made anew after every evaluation.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.config.metrics import cost
from engine.config.schema.run import RunConfig
from engine.logs import logger
from engine.train.hooks import Hook, Run
from engine.train.metrics import is_evaluation
from engine.train.records import Record, metric_of

LINK = "best"
_log = logger(__name__)


def best_checkpoint(folder: Path, metric: str) -> Path | None:
    """Return the checkpoint of a run with the best value of the metric, of equal ones the earliest; None where no
    checkpoint has one."""
    checkpoints = {step_of(path): path for path in committed(folder / CHECKPOINTS)}
    values = metric_of(folder, checkpoints, metric)
    best = min(values, key=lambda step: (cost(metric, values[step]), step), default=None)
    return None if best is None else checkpoints[best]


class BestCheckpoint(Hook):
    """Hook that keeps the link, on the main rank; retention (`checkpoint.keep_best`) keeps the checkpoint."""

    def __init__(self, config: RunConfig, is_main_rank: bool) -> None:
        self._folder, self._metric, self._is_main_rank = config.folder, config.checkpoint.best_metric, is_main_rank

    def take_record(self, record: Record) -> None:
        if is_evaluation(record):
            self._link()

    def end_run_stage(self, run: Run) -> None:
        """Look again: the last save may have been committed after the last evaluation."""
        self._link()

    def _link(self) -> None:
        if not self._is_main_rank:
            return
        best = best_checkpoint(self._folder, self._metric)
        if best is None:
            return
        link, new = self._folder / LINK, self._folder / f".{LINK}.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            new.symlink_to(best.relative_to(self._folder))
            new.replace(link)
        except OSError as error:  # a file system without links, or full: whoever needs it finds the checkpoint itself
            _log.warning("%s cannot be linked to %s: %s", link, best.name, error.strerror or error)
