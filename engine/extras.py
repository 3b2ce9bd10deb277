"""Packages that only some commands need: imported where they are used, or told with the line that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from engine.errors import EnvironmentProblem


def need(module: str, purpose: str, extra: str) -> ModuleType:
    """Import a module of a package that the extra `extra` installs; `purpose` is what needs it.

    Raises:
        EnvironmentProblem: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{purpose} needs {module.partition('.')[0]}, which cannot be imported ({error})",
            f"an environment with palimpsest's extra `{extra}`",
            f"pip install 'palimpsest[{extra}]'",
        ) from error
