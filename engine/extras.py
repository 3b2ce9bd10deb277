"""Packages that only some commands need: imported when they are used, or named in an error."""

from __future__ import annotations

import importlib
from types import ModuleType

from engine.errors import EnvironmentProblem


def need(module: str, package: str, extra: str) -> ModuleType:
    """Import a module of a package that the extra `extra` installs.

    Raises:
        EnvironmentProblem: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.partition(".")[0]):
            raise  # something that the package itself lacks
        raise EnvironmentProblem(f"{package} is not installed", "", f"pip install 'palimpsest[{extra}]'") from error
