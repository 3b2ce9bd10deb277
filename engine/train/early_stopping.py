"""Hook that ends a run once its evaluations no longer improve (`evaluation.early_stopping`).

Invariant: the end depends on the recorded evaluations alone. A checkpoint of a step is saved before the evaluation of
that step, so a start that goes on from it takes that evaluation from `metrics.jsonl`, or makes up for it: a run that
was stopped anywhere ends at the step of an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config.metrics import cost
from engine.config.schema.run import RunConfig
from engine.errors import EnvironmentProblem
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.train.hooks import Hook, Run
from engine.train.metrics import is_evaluation
from engine.train.records import Record, records_of

_log = logger(__name__)


@dataclass
class Progress:
    """Evaluations so far, equal on every rank."""

    step: int = 0
    """Step of the last one."""
    best: float | None = None
    """Best value of the metric; None before the first one that is finite."""
    best_step: int = 0
    unimproved: int = 0
    """Evaluations in a row, up to the last one, that were no improvement."""


class EarlyStopping(Hook):
    """Hook that counts evaluations without an improvement and, after `patience` of them, ends the run stage."""

    section = "early_stopping"

    def __init__(self, config: RunConfig) -> None:
        assert config.evaluation.early_stopping is not None, "standard_hooks makes it where it is asked for"
        self._config = config.evaluation.early_stopping
        self.metric = self._config.metric or config.checkpoint.best_metric
        self.progress = Progress()

    def take_record(self, record: Record) -> None:
        """Count an evaluation. Every rank is given the same records."""
        if not is_evaluation(record) or record["step"] <= self.progress.step:
            return
        now, value = self.progress, record.get(self.metric, math.nan)  # a value that is not finite is not recorded
        now.step = int(record["step"])
        improved = math.isfinite(value) and (
            now.best is None or cost(self.metric, value) < cost(self.metric, now.best) - self._config.min_delta
        )
        if improved:
            now.best, now.best_step, now.unimproved = value, now.step, 0
        else:
            now.unimproved += 1

    def ends_early(self) -> bool:
        """Return True once no evaluation has improved for too long."""
        return self.progress.unimproved >= self._config.patience

    def start(self, run: Run) -> bool:
        """Take the evaluation of the step where the run goes on, which its checkpoint does not know of."""
        self._take_recorded(run)
        return False

    def after_rollback(self, run: Run) -> None:
        self._take_recorded(run)

    def between_steps(self, run: Run) -> bool:
        """Save where the run ends early; the last step of a run is saved by the loop."""
        if self.ends_early() and run.state.stage_step < run.run_stage.num_steps:
            now = self.progress
            _log.info(
                "the run ends early, at step %d of %d: %d evaluations in a row without an improvement of %s, which was "
                "%.4f at step %d",
                run.state.step, run.config.num_steps, now.unimproved, self.metric,
                math.nan if now.best is None else now.best, now.best_step,
            )  # fmt: skip
            if not run.checkpoints.finish(run.state):
                run.save(wait=True)
        return False

    def state(self) -> dict[str, Any]:
        return asdict(self.progress)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state)

    def _take_recorded(self, run: Run) -> None:
        """Take the recorded evaluation of the present step. Collective over the world."""
        folder, step = run.config.folder, run.state.step
        for record in on_first(lambda: records_of(folder, step), run.groups.world, EnvironmentProblem):
            self.take_record(record)
