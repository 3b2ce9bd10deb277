"""Names of the environment variables that are our own, and numbers read from variables of any launcher."""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import EnvironmentProblem

Environ = Mapping[str, str]

JOB, ATTEMPT, LAUNCHER = "PALIMPSEST_JOB", "PALIMPSEST_ATTEMPT", "PALIMPSEST_LAUNCHER"
RUN_FOLDER = "PALIMPSEST_RUN_FOLDER"
"""Variables of `palimpsest launch` alone, beside RANK, WORLD_SIZE and the other usual ones."""
OVERRIDES = "PALIMPSEST_OVERRIDES"
"""Overrides that hold credentials, as a JSON list: all users of a node see command lines, variables only the owner."""


def number(environ: Environ, name: str) -> int:
    """Return the whole number that a variable holds. Raises `EnvironmentProblem` where it is not set or none."""
    text = environ.get(name)
    if text is None or not text.strip():
        raise EnvironmentProblem(
            f"{name} is not set, but other variables say that a launcher started this rank",
            "all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or none of them",
            f"set {name}, or start the ranks with palimpsest launch, torchrun, deepspeed, srun or mpirun",
        )
    try:
        return int(text)
    except ValueError:
        raise EnvironmentProblem(f"{name} = {text!r} is no number", "a whole number", f"set {name} anew") from None


def first_number(environ: Environ, names: tuple[str, ...], default: int | None) -> int:
    """Return the first of several variables that is set; without a default the first one is required."""
    for name in names:
        if environ.get(name):
            return number(environ, name)
    return number(environ, names[0]) if default is None else default
