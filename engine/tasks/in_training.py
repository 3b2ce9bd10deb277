"""Measures of a task's predictions at the evaluations of a run, by the task's own kind."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.data.shards.dataset import TokenDataset
from engine.tasks.kinds import KINDS
from engine.tasks.measures import Measures
from engine.tasks.predict import without_padding
from engine.train.predictions import Measure


def measure_of(run: RunConfig) -> Measure:
    """Return the function that measures the logits of a run's head.

    Raises:
        EnvironmentProblem: a package of the measures is missing.
    """
    for run_stage in run.stages:
        if (kind := KINDS.get(run_stage.objective.name)) is not None:
            kind.require_packages()
    return measure


def measure(run_stage: RunStage, dataset: TokenDataset, logits: list[np.ndarray]) -> dict[str, float]:
    """Return the measures of the logits of all rows of a data set, as `numbers`; none where the run stage has another
    objective than a task."""
    kind = KINDS.get(run_stage.objective.name)
    if kind is None:
        return {}
    return numbers(kind.decode(without_padding(logits, dataset), dataset, run_stage.objective).measures())


def numbers(measures: Measures) -> dict[str, float]:
    """Return the finite numbers among measures, those of a table under `NAME/KEY`."""
    found: dict[str, float] = {}
    for name, value in measures.items():
        table = {f"{name}/{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {key: float(each) for key, each in table.items() if isinstance(each, float) and math.isfinite(each)}
    return found
