"""The best checkpoint of a run, by `checkpoint.best_metric`, of those that are there.

It follows from `metrics.jsonl` and the committed checkpoints alone.
"""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.config.metrics import cost
from engine.config.schema.checkpoint import CheckpointConfig
from engine.train.records import metric_of


def best_checkpoint(folder: Path, metric: str) -> Path | None:
    """Return the checkpoint of a run with the best value of the metric, of equal ones the earliest; None where no
    checkpoint has one."""
    checkpoints = {step_of(path): path for path in committed(folder / CHECKPOINTS)}
    values = metric_of(folder, checkpoints, metric)
    best = min(values, key=lambda step: (cost(metric, values[step]), step), default=None)
    return None if best is None else checkpoints[best]


def chosen_checkpoint(folder: Path, config: CheckpointConfig) -> Path | None:
    """Return the checkpoint that stands for a run once it is done: the best one, where the run keeps it. None means the
    newest."""
    return best_checkpoint(folder, config.best_metric) if config.keep_best else None
