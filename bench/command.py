"""Runs a benchmark's `main` as a command: errors that a user can meet are shown in three parts, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from engine.errors import PalimpsestError


def run(main: Callable[..., Any] | typer.Typer) -> None:
    """Parse the command line for a function or an application of several, call it and exit."""
    try:
        if isinstance(main, typer.Typer):
            main()
        else:
            typer.run(main)
    except PalimpsestError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
