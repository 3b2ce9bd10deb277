"""A step of the job: one srun, which is started again for a while where Slurm refuses to make the step.

A controller that was just restarted refuses steps until it has heard of its nodes ("Memory required by task is not
available"), and one that is away cannot be asked. Nothing of the step has begun then, so that to try again is safe.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine import logs

REFUSED_SECONDS = 120.0
"""Seconds for which a refused step is tried again; a large controller takes that long to hear of its nodes."""
AGAIN_SECONDS = 2.0
"""Seconds between two tries."""
_REFUSAL = re.compile(r"^srun: error: (Unable to (?:create step|confirm allocation).*)$", re.MULTILINE)
_WAIT = re.compile(r"^srun: (?:error: )?(.*\bretrying\b.*)$", re.MULTILINE)
"""srun tries again by itself, without end: nodes are busy with another step, or the controller does not answer."""

_log = logs.logger(__name__)


class Step:
    """One step, from its start on. Output of srun itself is added to the file `log`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start the step. Raises `OSError` where srun cannot be started."""
        self._command, self._environment, self._log = command, environment, log
        self._give_up_at = time.monotonic() + REFUSED_SECONDS
        self._again_at: float | None = None
        self._told = self._told_of_wait = self._has_begun = False
        self._start()

    def poll(self) -> int | None:
        """Return the step's exit code; None while it runs, or is to be started again."""
        code, now = self._srun.poll(), time.monotonic()
        if self._has_begun:
            return code
        if code is None and not self._told_of_wait and (found := _WAIT.search(self._said())) is not None:
            _log.warning("%s: Slurm does not start the step yet", found[1])
            self._told_of_wait = True
        if code is None or code == 0 or (self._again_at is None and not self._is_refused(now)):
            return code
        if self._again_at is None:
            self._again_at = now + AGAIN_SECONDS
        if now >= self._again_at:
            # Where srun cannot be started this time, the next look finds the refusal of before.
            with contextlib.suppress(OSError):
                self._start()
        return None

    def mark_begun(self) -> None:
        """Leave the log alone from now on, and the step unrepeated: a process of it was seen.

        The log may lie on a shared file system, and a look comes ten times a second.
        """
        self._has_begun = True

    def kill(self) -> int:
        """End srun where it still runs, not the step's processes, and return its exit code."""
        if self._srun.poll() is None:
            # By its group and not by srun's own handlers, which ask Slurm and wait for nodes that are gone.
            os.killpg(self._srun.pid, signal.SIGKILL)
        return self._srun.wait()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of srun; return False where it still runs after so many seconds."""
        try:
            self._srun.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _start(self) -> None:
        self._again_at = None
        with self._log.open("ab") as file:
            self._said_before = file.tell()
            self._srun = subprocess.Popen(
                self._command,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it gets no signal that is meant for the conductor
            )

    def _is_refused(self, now: float) -> bool:
        """Return True if Slurm has refused the step and it is not too late to ask again; tell it once."""
        found = _REFUSAL.search(self._said())
        if found is None:
            return False
        if not self._told:
            _log.warning("%s; trying again for %.0f s", found[1], REFUSED_SECONDS)
        self._told = True
        return now < self._give_up_at

    def _said(self) -> str:
        """Return the beginning of what this srun has said: ranks write to files of their own."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._said_before)
                return file.read(1 << 16).decode(errors="replace")
        except OSError:
            return ""
