"""Patterns on the logical names of parameters: factors of the learning rate, and which parameters are frozen.

Pure and without torch, so that a plan, `resolve` and training answer alike. A tied weight has one logical name.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence

from engine.config.schema.stage import RunStage


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if one of the patterns (shell style, as `layers.0.*`) matches a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def rate_factors(name: str, run_stages: Sequence[RunStage]) -> tuple[float, ...]:
    """Return the factor of the learning rate of one parameter in each run stage."""
    # Factors of all matching patterns multiply, so that their order in the file does not matter.
    return tuple(
        math.prod(factor for pattern, factor in run_stage.learning_rate_factors.items() if matches(name, [pattern]))
        for run_stage in run_stages
    )


def trained_since(name: str, run_stages: Sequence[RunStage], number: int) -> int | None:
    """Return the first of the consecutive run stages up to `number` in which a parameter is trained; None if it is
    frozen in run stage `number`.

    Its moments began there. Frozen in run stage 1 of 4: 0 in run stage 0, None in 1, 2 in 2 and 3.
    """
    since = None
    for index, run_stage in enumerate(run_stages[: number + 1]):
        if matches(name, run_stage.freeze):
            since = None
        elif since is None:
            since = index
    return since
