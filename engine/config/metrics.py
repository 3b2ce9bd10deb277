"""Metrics by which a run compares its steps: their names, and which of two values is the better one. Pure.

A metric has the name under which `metrics.jsonl` holds it. The measures of a task's predictions on the validation data
are `validation_NAME`.
"""

from __future__ import annotations

from engine.config.objectives import OBJECTIVES
from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage

TRAINING_LOSS, VALIDATION_LOSS = "loss", "validation_loss"
MEASURE = "validation_"
"""Beginning of the names of measures."""
RANKED = ("accuracy", "accuracy_by_length")
"""Measures of each file in `evaluation.tasks`."""


def evaluated_metrics(config: RunConfig) -> tuple[str, ...]:
    """Return the metrics that every evaluation of a run records; none where a run stage has no validation data."""
    if any(run_stage.data.validation is None for run_stage in config.stages):
        return ()
    # Names that all run stages have, in the order of the first one's.
    measures = [_measures(config, run_stage) for run_stage in config.stages]
    common = [name for name in measures[0] if all(name in others for others in measures)]
    ranked = [f"{MEASURE}{name}/{task}" for task in config.evaluation.tasks for name in RANKED]
    return (VALIDATION_LOSS, *(f"{MEASURE}{name}" for name in common), *ranked)


def _measures(config: RunConfig, run_stage: RunStage) -> tuple[str, ...]:
    # Predictions are measured on the whole of one data set (`engine.data.validation.ValidationSamples.is_measured`).
    is_measured = config.model.task_head is not None and isinstance(run_stage.data.validation, str)
    if not is_measured or config.evaluation.max_samples is not None:
        return ()
    return OBJECTIVES[run_stage.objective.name].measures


def lower_is_better(metric: str) -> bool:
    """Return True for losses and errors, False for other measures."""
    return metric.endswith(("loss", "error"))


def cost(metric: str, value: float) -> float:
    """Return the value as a number of which less is better."""
    return value if lower_is_better(metric) else -value
