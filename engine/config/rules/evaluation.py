"""Rules of the evaluation: an alarm needs a limit, what it does needs its bounds, and early stopping evaluations.

Part of `engine.config.resolve`, which calls them all and reports every problem at once.
"""

from __future__ import annotations

import itertools

from engine.config.metrics import evaluated_metrics
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError


def check_alarm(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules that a reaction to forgetting breaks: it needs something to react to, and to react with."""
    evaluation = config.evaluation
    if evaluation.on_forgetting != "warn" and evaluation.forgetting_limit is None:
        problems.append(
            ConfigError(
                f"evaluation.on_forgetting = {evaluation.on_forgetting} without evaluation.forgetting_limit",
                "both, or neither",
                "set evaluation.forgetting_limit, for example 0.1 (nats per token)",
            )
        )
    if (evaluation.on_forgetting == "raise") != bool(evaluation.raised_ratios):
        problems.append(
            ConfigError(
                f"evaluation.on_forgetting = {evaluation.on_forgetting} with evaluation.raised_ratios = "
                f"{list(evaluation.raised_ratios)}",
                "on_forgetting: raise and the ratios that it goes through, or neither",
                "set both, for example raised_ratios: [0.1, 0.25, 0.5], or leave raised_ratios out",
            )
        )
    if evaluation.on_forgetting == "raise":
        _check_raised(config, problems)


def check_early_stopping(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules that early stopping breaks: one run stage, evaluations on the way, and a metric that they have."""
    stopping = config.evaluation.early_stopping
    if stopping is None:
        return
    if len(config.stages) > 1:
        problems.append(
            ConfigError(
                f"evaluation.early_stopping in a run of {len(config.stages)} stages",
                "a run of one stage",
                "leave it out, or train the stages as runs of their own, each with init_from",
            )
        )
    known, metric = evaluated_metrics(config), stopping.metric or config.checkpoint.best_metric
    if metric not in known:
        problems.append(
            ConfigError(
                f"evaluation.early_stopping watches {metric}, which no evaluation of this run records",
                ", ".join(known) or "a metric of evaluations: data.validation is missing",
                "set evaluation.early_stopping.metric (or checkpoint.best_metric, its default) and data.validation",
            )
        )
    if config.evaluation.every_steps is None:
        problems.append(
            ConfigError(
                "evaluation.early_stopping without evaluation.every_steps: the one evaluation is at the end",
                "evaluations on the way",
                "set evaluation.every_steps",
            )
        )


def check_questions(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rule that questions ranked by likelihood break: every run stage has to have one, of the next token."""
    for index, run_stage in enumerate(config.stages if config.evaluation.tasks else ()):
        if run_stage.objective.name not in ("causal", "fill_in_the_middle"):
            problems.append(
                ConfigError(
                    f"evaluation.tasks with stages.{index}.objective = {run_stage.objective.name}",
                    "objective causal or fill_in_the_middle, which have the likelihood of an answer",
                    "leave evaluation.tasks out",
                )
            )


def _check_raised(config: RunConfig, problems: list[PalimpsestError]) -> None:
    ratios = config.evaluation.raised_ratios
    if any(not 0 < ratio < 1 for ratio in ratios) or any(a >= b for a, b in itertools.pairwise(ratios)):
        problems.append(
            ConfigError(
                f"evaluation.raised_ratios = {list(ratios)}",
                "shares of replayed samples above 0 and below 1, each larger than the one before",
                "for example [0.1, 0.25, 0.5]",
            )
        )
    if not any(stage.replay is not None for stage in config.stages[1:]):
        problems.append(
            ConfigError(
                "evaluation.on_forgetting = raise, and no run stage behind the first one replays anything",
                "`replay` in a run stage that may forget, if with a ratio of 0",
                "set stages.N.replay, or on_forgetting to warn or stop",
            )
        )
