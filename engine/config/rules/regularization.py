"""Rules of what a run stage keeps beside its weights: penalties, the average, the meta-step.

Part of `engine.config.resolve`, which calls them all and reports every problem at once.
"""

from __future__ import annotations

from engine.config.schema.objective import ObjectiveName
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError


def check_regularization(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules of consolidation and distillation, and of periods that a run stage never comes to."""
    for number in range(len(config.stages)):
        _check_ewc(number, config, problems)
        _check_distillation(number, config, problems)
        _check_periods(number, config, problems)


def _check_ewc(number: int, config: RunConfig, problems: list[PalimpsestError]) -> None:
    ewc = config.stages[number].regularization.ewc
    if ewc is None:
        return
    key = f"stages.{number}.regularization.ewc"
    if number == 0:
        problems.append(
            ConfigError(
                f"{key}: no run stage comes before it whose data its Fisher information could be estimated on",
                "ewc from the second run stage on",
                f"remove {key}, or pull all weights alike with stages.0.regularization.l2_sp",
            )
        )
        return
    before = config.stages[number - 1]
    if not _has_length(number - 1, config) or ewc.batches <= before.num_steps:
        return
    problems.append(
        ConfigError(
            f"{key}.batches = {ewc.batches} is more than the {before.num_steps} steps of the run stage before, "
            f"{before.name}",
            f"1 to {before.num_steps}",
            f"lower {key}.batches",
        )
    )


def _check_distillation(number: int, config: RunConfig, problems: list[PalimpsestError]) -> None:
    run_stage, vocab_size = config.stages[number], config.model.vocab_size
    distillation, key = run_stage.regularization.distillation, f"stages.{number}.regularization.distillation"
    if distillation is None:
        return
    predicts_tokens = config.model.task_head is None or run_stage.replayed_objective is not None
    if not predicts_tokens and not config.distils_labels(number):
        problems.append(nothing_to_distil(key, run_stage.objective.name))
    if predicts_tokens and distillation.top_k > vocab_size:
        key = f"{key}.top_k"
        problems.append(
            ConfigError(
                f"{key} = {distillation.top_k} is more than the {vocab_size} tokens of the vocabulary",
                f"1 to {vocab_size}",
                f"lower {key}",
            )
        )


def nothing_to_distil(key: str, objective: ObjectiveName) -> ConfigError:
    """Return the error for distillation (`key`) beside a head whose first predictions are nothing to keep."""
    reason = "predicts a number, no distribution" if objective == "regression" else "has a new head to begin with"
    return ConfigError(
        f"{key} with objective {objective}, which {reason}, and without text that is replayed",
        "labels that the start of the run predicts already (init_from.head = keep), or tokens of replayed text",
        f"start from a model with a head for these labels, replay text ({key.partition('.regularization')[0]}.replay), "
        "or pull the weights instead (regularization.l2_sp)",
    )


def _check_periods(number: int, config: RunConfig, problems: list[PalimpsestError]) -> None:
    run_stage = config.stages[number]
    periods = {name: getattr(run_stage, name) for name in ("ema", "reptile")}
    for name, section in periods.items():
        if section is None or not _has_length(number, config) or section.every_steps <= run_stage.num_steps:
            continue
        key = f"stages.{number}.{name}.every_steps"
        problems.append(
            ConfigError(
                f"{key} = {section.every_steps} is never reached in a run stage of {run_stage.num_steps} steps",
                f"1 to {run_stage.num_steps}",
                f"lower {key}, or remove stages.{number}.{name}",
            )
        )


def _has_length(number: int, config: RunConfig) -> bool:
    """Return True if the steps of a run stage can be counted; another rule tells where they cannot."""
    duration = config.stages[number].duration
    return (duration.steps is None) != (duration.tokens is None)
