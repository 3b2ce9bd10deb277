"""Signals that ask a run to save and stop: they set a flag, and the ranks agree on it at the end of a step.

Launchers and clusters deliver a signal more than once, so those within five seconds of the first count as one; a
later one ends the process at once (contract "Outcome").
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from engine.errors import EXIT_FAILURE, EXIT_REQUEUE, PalimpsestError
from engine.logs import logger

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 5.0

_log = logger(__name__)


class Stopping(PalimpsestError):
    """This rank was asked to stop and cannot finish its step; the run ends at the step before."""

    exit_code = EXIT_REQUEUE


class StopSignals:
    """While entered, catches `STOP`; `asked` says whether one has come to this rank."""

    def __init__(self) -> None:
        self.asked = False
        self._first_seconds = 0.0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._on_signal) for number in STOP}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first_seconds > SAME_SIGNAL_SECONDS:
            _log.error("second %s: ending at once", signal.Signals(number).name)
            os._exit(EXIT_FAILURE)
        if not self.asked:
            self.asked, self._first_seconds = True, now
            _log.warning("%s: saving at the end of this step, then stopping", signal.Signals(number).name)
