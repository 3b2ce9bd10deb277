"""Processes that a launch has started itself: their output goes to a log, and one of them is shown."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EnvironmentProblem
from launcher.commands import Command
from launcher.verdict import End

TEE_SECONDS = 5.0
"""How long the last output of a process that has ended is waited for."""


class Child:
    """One process that we started, in a session of its own so that a terminal's Ctrl-C reaches only us."""

    def __init__(self, command: Command, more: Mapping[str, str], log_folder: Path, shown: bool) -> None:
        self.name = command.name
        self._log = (log_folder / f"{command.name}.log").open("ab")
        try:
            self.popen = subprocess.Popen(
                command.argv,
                env=command.environment_in(os.environ) | dict(more),
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
        self._tee = threading.Thread(target=self._show, daemon=True) if shown else None
        if self._tee:
            self._tee.start()

    def _show(self) -> None:
        """Copies the output to the terminal and the log until the last process that holds the pipe is gone."""
        pipe: Any = self.popen.stdout
        while chunk := pipe.read1(1 << 16):
            self._log.write(chunk)
            self._log.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    def end(self) -> End:
        """How it ended; waits for that."""
        code = self.popen.wait()
        if self._tee:
            self._tee.join(timeout=TEE_SECONDS)
        self._log.close()
        return End(self.name, code)
