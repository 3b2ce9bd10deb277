"""Predictions of several fine-tuned models together: the mean of their probabilities, or of their numbers.

The mean of probabilities is the ensemble of Lakshminarayanan et al. 2017 (arXiv 1612.01474), section 2.4. Models may
be of any size and family, if their runs are of the same task; each predicts on the examples as it has them encoded.

Legend: C labels, or predicted numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.config.objectives import OBJECTIVES
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.errors import ConfigError
from engine.serve.source import Trained
from engine.tasks.kind import Predictions
from engine.tasks.kinds import KINDS
from engine.tasks.learned import open_learned
from engine.tasks.predict import logits_of


def ensemble(folders: Sequence[Path]) -> Predictions:
    """Return the predictions of the models of run folders together, on the validation examples of their task.

    Raises:
        ConfigError: a folder holds no run of a task, or the runs are not of one task with the same labels and examples.
        DataError, CheckpointError: examples or checkpoints are damaged.
    """
    members = [_opened(folder) for folder in folders]
    (_, first, _), location = members[0], _location(members[0][1])
    total: list[np.ndarray] = []
    for trained, stage, folder in members:
        if _task(stage) != _task(first):
            raise ConfigError(
                f"{folder} is a run of {_task(stage)}", f"{_task(first)}, as {folders[0]}", "name runs of one task"
            )
        found = [_shares(row, stage) for row in logits_of(trained, stage, TokenDataset(_location(stage)))]
        if total and [row.shape for row in total] != [row.shape for row in found]:
            raise ConfigError(
                f"the validation examples of {folder} are not those of {folders[0]}", "the same examples", "check them"
            )
        total = [one + other for one, other in zip(total, found, strict=True)] if total else found
    # As logits again, whose softmax is the mean: what a kind decodes.
    mean = [_as_logits(row / len(members), first) for row in total]
    return KINDS[first.objective.name].decode(mean, TokenDataset(location), first.objective)


def _opened(folder: Path) -> tuple[Trained, RunStage, Path]:
    trained = open_learned(folder)
    run: RunConfig | None = trained.run
    if run is None or run.stages[-1].objective.name not in KINDS:
        raise ConfigError(f"{folder} is no run of a task", "a run folder of `palimpsest finetune`", "name another one")
    if not OBJECTIVES[name := run.stages[-1].objective.name].has_head:
        measured = ", ".join(one for one, entry in OBJECTIVES.items() if entry.has_head)
        raise ConfigError(
            f"{folder} is a run of objective {name}, whose answers are generated token by token",
            f"runs of {measured}",
            "merge their weights instead: palimpsest checkpoint merge",
        )
    return trained, run.stages[-1], folder


def _task(stage: RunStage) -> str:
    return f"{stage.objective.name} with labels {', '.join(stage.objective.labels) or 'none'}"


def _location(stage: RunStage) -> str:
    locations = stage.data.validation_locations
    if len(locations) != 1:
        raise ConfigError(
            f"stage {stage.name} has {len(locations)} validation sets", "one", "fine-tune with data.validation"
        )
    return locations[0]


def _shares(logits: np.ndarray, stage: RunStage) -> np.ndarray:
    """Return the probabilities of logits (..., C), or numbers as they are; fp64."""
    if not stage.objective.labels:
        return logits.astype(np.float64)
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _as_logits(shares: np.ndarray, stage: RunStage) -> np.ndarray:
    if not stage.objective.labels:
        return shares.astype(np.float32)
    return np.log(np.maximum(shares, np.finfo(np.float64).tiny)).astype(np.float32)
