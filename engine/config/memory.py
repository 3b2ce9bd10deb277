"""Rules of what a layout does about memory and of the axes along a row's time: part of `engine.config.resolve`."""

from __future__ import annotations

from engine.config.lengths import row_lengths
from engine.config.schema import RunConfig, RunStage
from engine.errors import ConfigError, PalimpsestError


def check_recompute(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """A number of layers or a budget of bytes says how many layers recompute: one of them, and how."""
    parallel = config.parallel
    given = [key for key in ("recompute_layers", "activation_gib") if getattr(parallel, key) is not None]
    if given and parallel.recompute == "none":
        problems.append(
            ConfigError(
                f"parallel.{given[0]} = {getattr(parallel, given[0])} with parallel.recompute = none",
                "recompute selective or full with it",
                f"set parallel.recompute=full, or leave {given[0]} out",
            )
        )
    if len(given) > 1:
        problems.append(
            ConfigError("parallel.recompute_layers and parallel.activation_gib", "one of them", "leave one out")
        )


SHARES_TIME = ("gpt", "bert")
"""Families whose layers may hold a stretch of the rows' time."""


def check_time(key: str, stage: RunStage, config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Ranks that share the time of a row divide its length."""
    parallel, lengths = config.parallel, row_lengths(stage)
    if parallel.shared_by == 1:
        return
    if config.model.family not in SHARES_TIME:
        problems.append(
            ConfigError(
                f"parallel.sequence_parallel = true with model.family = {config.model.family}",
                f"model.family {' or '.join(SHARES_TIME)} with it",
                "set parallel.sequence_parallel=false",
            )
        )
    if lengths.tokens % parallel.shared_by:
        problems.append(
            ConfigError(
                f"parallel.tensor = {parallel.tensor} with sequence_parallel does not divide "
                f"{key}.sequence_length = {lengths.tokens}",
                f"a multiple of {parallel.shared_by}",
                "change the length or parallel.tensor, or set parallel.sequence_parallel=false",
            )
        )
