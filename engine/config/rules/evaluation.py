"""Rules of the evaluation: an alarm needs a limit, and what it does needs its bounds.

Part of `engine.config.resolve`, which calls them all and reports every problem at once.
"""

from __future__ import annotations

import itertools

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
