"""Optional packages of deployment formats, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from engine.errors import EnvironmentProblem


def needed(name: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises `EnvironmentProblem` with the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{purpose} needs {name}, which cannot be imported ({error})",
            "an environment with palimpsest's extra `deploy`",
            "pip install 'palimpsest[deploy]'",
        ) from error
