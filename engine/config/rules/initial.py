"""Rules of `init_from`. Part of `engine.config.resolve`, which calls them all and reports every problem at once."""

from __future__ import annotations

from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, PalimpsestError


def check_initial(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add the rules that the source of the first weights breaks."""
    given = config.init_from
    if given is not None and given.new_rows == "mean" and given.missing == "error":
        problems.append(
            ConfigError(
                "init_from.new_rows = mean with init_from.missing = error, under which no row is new",
                "new_rows: mean with missing: initialise",
                "set init_from.missing=initialise, or leave new_rows out",
            )
        )
