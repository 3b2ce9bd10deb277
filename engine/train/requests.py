"""Requests to stop or to save: signals, switch files, the job's time limit, and `checkpoint.every_minutes`.

Every rank looks at its own signals; the main rank alone looks at clocks and files. The ranks agree at the end of a
step, in the all-reduce of the losses, so a request of one of them is obeyed by all after the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.config.schema.run import RunConfig
from engine.logs import logger
from engine.switch_files import SAVE, STOP, SwitchFiles
from engine.train.signals import StopSignals
from engine.train.time_limit import job_seconds_left

_log = logger(__name__)


class Requests:
    """Requests that one rank has got. `is_main_rank` decides whether it looks at clocks and switch files."""

    def __init__(
        self,
        config: RunConfig,
        signals: StopSignals,
        is_main_rank: bool,
        clock: Callable[[], float] = time.monotonic,
        seconds_left: Callable[[], float | None] = job_seconds_left,
    ) -> None:
        self.signals, self._clock = signals, clock
        self._files = SwitchFiles(config.folder, clock) if is_main_rank else None
        minutes = config.checkpoint.every_minutes
        self._save_seconds = 60 * minutes if minutes is not None and is_main_rank else None
        self._saved_seconds = clock()
        self._stop_seconds: float | None = None
        """Time on the clock at which the run has to stop for the job's time limit."""
        self._told = False
        before = config.launch.stop_before_seconds
        if before is not None and is_main_rank:
            left = seconds_left()
            if left is None:
                _log.warning("launch.stop_before_seconds is not used: this job has no time limit that can be looked up")
            else:
                self._stop_seconds = clock() + left - before

    @property
    def stop_requested(self) -> bool:
        """True once this rank has been asked to save and to leave."""
        if self.signals.stop_requested:
            return True
        if self._files is not None and STOP in self._files.found():
            return self._stop(f"{self._files.folder / STOP} is there")
        if self._stop_seconds is not None and self._clock() >= self._stop_seconds:
            return self._stop("the job's time limit is near (launch.stop_before_seconds)")
        return False

    @property
    def save_requested(self) -> bool:
        """True while a checkpoint is due by the clock or by the switch file; `saved` ends it."""
        by_file = self._files is not None and SAVE in self._files.found()
        return by_file or (self._save_seconds is not None and self._clock() - self._saved_seconds >= self._save_seconds)

    def saved(self) -> None:
        """Count a checkpoint that has begun: the next one by the clock is due later, and the switch file has served."""
        self._saved_seconds = self._clock()
        if self._files is not None and SAVE in self._files.found():
            try:
                (self._files.folder / SAVE).unlink(missing_ok=True)
            except OSError as error:
                # Left there it would ask for a checkpoint after every step.
                path, why = self._files.folder / SAVE, error.strerror or error
                _log.warning("%s cannot be removed (%s): switch files are not looked at any more", path, why)
                self._files = None

    def _stop(self, why: str) -> bool:
        if not self._told:
            _log.warning("%s: saving at the end of this step, then stopping", why)
            self._told = True
        return True
