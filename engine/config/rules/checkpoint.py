"""Rules of saving and retention. Part of `engine.config.resolve`, which reports every problem at once."""

from __future__ import annotations

from engine.config.metrics import TRAINING_LOSS, evaluated_metrics
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError


def check_keeping(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of retention and of checkpoints in memory: which steps there are, and which have a metric."""
    checkpoint, every = config.checkpoint, config.checkpoint.every_steps
    if checkpoint.keep_every is not None and (every is None or checkpoint.keep_every % every):
        problems.append(
            ConfigError(
                f"checkpoint.keep_every = {checkpoint.keep_every} with checkpoint.every_steps = {every}",
                "a multiple of checkpoint.every_steps",
                "change one of them: steps that are not saved cannot be kept",
            )
        )
    if checkpoint.keep_best and every is None:
        problems.append(
            ConfigError(
                f"checkpoint.keep_best = {checkpoint.keep_best} without checkpoint.every_steps",
                "checkpoint.every_steps set",
                "set it: one checkpoint, at the end, has nothing to be better than",
            )
        )
    elif checkpoint.keep_best and checkpoint.best_metric != TRAINING_LOSS:
        _check_evaluated(config, every, problems)
    _check_memory(config, every, problems)


def _check_memory(config: RunConfig, every: int | None, problems: list[PalimpsestError]) -> None:
    memory = config.checkpoint.memory
    if memory is None:
        return
    if every is not None and memory.every_steps % every == 0:
        problems.append(
            ConfigError(
                f"checkpoint.memory.every_steps = {memory.every_steps} with checkpoint.every_steps = {every}: each of "
                "these steps goes to the disk",
                "steps between those that go to the disk",
                "lower checkpoint.memory.every_steps, or leave checkpoint.memory out",
            )
        )
    if not memory.folder.is_absolute():
        problems.append(
            ConfigError(
                f"checkpoint.memory.folder = {memory.folder}",
                "an absolute path, on a file system that each node has in its memory",
                "leave it out for /dev/shm",
            )
        )


def _check_evaluated(config: RunConfig, every: int | None, problems: list[PalimpsestError]) -> None:
    evaluated, metric, known = config.evaluation.every_steps, config.checkpoint.best_metric, evaluated_metrics(config)
    if known and metric not in known:
        problems.append(
            ConfigError(
                f"checkpoint.best_metric = {metric}, which no evaluation of this run records",
                ", ".join((TRAINING_LOSS, *known)),
                "name one of these",
            )
        )
    if known and evaluated is not None and every is not None and every % evaluated == 0:
        return
    problems.append(
        ConfigError(
            f"checkpoint.keep_best = {config.checkpoint.keep_best} by {metric}, with evaluation.every_steps = "
            f"{evaluated}, checkpoint.every_steps = {every}{'' if known else ' and no validation data'}",
            "data.validation, and an evaluation at each step that is saved",
            "let evaluation.every_steps divide checkpoint.every_steps, or set checkpoint.best_metric=loss",
        )
    )
