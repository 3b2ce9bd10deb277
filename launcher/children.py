"""Processes that a launch has started itself: their output goes to a log, and one of them is shown."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from engine.errors import EnvironmentProblem
from launcher.commands import Command
from launcher.copying import Copier
from launcher.verdict import End

COPY_SECONDS = 5.0
"""Seconds to wait for the last output of a process that has ended; a grandchild may hold the pipe open."""


class Child:
    """One process that we started, in a session of its own so that a terminal's Ctrl-C reaches only us."""

    def __init__(self, command: Command, more: Mapping[str, str], log_folder: Path, shown: bool) -> None:
        self.name = command.name
        path = log_folder / f"{command.name}.log"
        try:
            self._log = path.open("ab", buffering=0)  # a restart goes on in the log
        except OSError as error:
            raise EnvironmentProblem(
                f"log {path} cannot be written: {error.strerror}", "a file that can be written", "remove it"
            ) from error
        try:
            self.popen = subprocess.Popen(
                command.argv,
                env=command.environment_in(os.environ) | dict(more),
                # A rank that asked on the terminal would wait for an answer that goes to all of them.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if shown else self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise EnvironmentProblem(
                f"{command.argv[0]} cannot be started: {error.strerror}",
                remedy="install the package in the environment that runs palimpsest, or use --launcher local",
            ) from error
        self._copier = Copier(self.popen.stdout, self._log, path) if self.popen.stdout is not None else None

    def end(self) -> End:
        """Wait for its end and return it."""
        code = self.popen.wait()
        if self._copier is not None:
            self._copier.end(COPY_SECONDS)
        else:
            self._log.close()
        return End(self.name, code)
