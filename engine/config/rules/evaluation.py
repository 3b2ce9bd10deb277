"""Rules of the evaluation: an alarm needs a limit.

Part of `engine.config.resolve`, which calls them all and reports every problem at once.
"""

from __future__ import annotations

from engine.config.schema.run import EvaluationConfig
from engine.errors import ConfigError, PalimpsestError


def check_alarm(evaluation: EvaluationConfig, problems: list[PalimpsestError]) -> None:
    """Add the rule that a reaction to forgetting has something to react to."""
    if evaluation.on_forgetting == "stop" and evaluation.forgetting_limit is None:
        problems.append(
            ConfigError(
                "evaluation.on_forgetting = stop without evaluation.forgetting_limit",
                "both, or neither",
                "set evaluation.forgetting_limit, for example 0.1 (nats per token)",
            )
        )
