"""`best` in a run folder: a link to its best checkpoint, which is made anew after every evaluation."""

from __future__ import annotations

import contextlib

from engine.config.schema.run import RunConfig
from engine.logs import logger
from engine.train.best import best_checkpoint
from engine.train.hooks import Hook, Run
from engine.train.metrics import is_evaluation
from engine.train.records import Record

LINK = "best"
_log = logger(__name__)


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
