"""Rules of the reservoir: the domains that it names, and what its quota needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from engine.config.schema.run import RunConfig
from engine.config.schema.stage import RunStage
from engine.errors import ConfigError, PalimpsestError


def check_reservoir(config: RunConfig, problems: list[PalimpsestError]) -> None:
    """Add every rule that the reservoir of a run breaks."""
    reservoir = config.reservoir
    if reservoir is None:
        return
    if (reservoir.quota == "fixed") != bool(reservoir.shares):
        problems.append(
            ConfigError(
                f"reservoir.quota = {reservoir.quota} {'with' if reservoir.shares else 'without'} reservoir.shares",
                "quota: fixed with a share for each domain that is kept, or another quota without shares",
                "for example reservoir: {rows: 1000, quota: fixed, shares: {web: 2, code: 1}}",
            )
        )
    known = [name for stage in config.stages for name in _domains(stage)]
    _check_names("reservoir.shares", reservoir.shares, known, problems)
    if reservoir.pin is not None:
        _check_names("reservoir.pin.domains", reservoir.pin.domains, known, problems)


def _domains(stage: RunStage) -> list[str]:
    """Return the domains of a run stage: its sources by their names, or itself."""
    return [source.name for source in stage.data.sources] or [stage.name]


def _check_names(key: str, names: Iterable[str], known: list[str], problems: list[PalimpsestError]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "name a source of the data, or a run stage without sources"
            problems.append(ConfigError(f"{key}: no domain has the name {name!r}", ", ".join(known), hint))
