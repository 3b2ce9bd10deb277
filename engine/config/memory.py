"""Rules of what a layout does about memory and of the axes along a row's time: part of `engine.config.resolve`."""

from __future__ import annotations

from engine.config.schema import RunConfig
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
