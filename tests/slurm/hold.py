"""The step at which ranks of a test wait until a fault has hit them, and the files by which they say where they are.

The variable `SLURM_TEST` names a folder on the shared disk, `HOLD_AT` a number of steps. A rank that has done so many
or more makes a file `at-RANK.ATTEMPT` there and waits once until `go` is there; a rank of the first attempt that finds
`freeze-RANK` there stops itself. `first-RANK.ATTEMPT` appears when a rank has done the first step of an attempt.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.config.rank_environment import RankEnvironment

FOLDER, HOLD_AT = "SLURM_TEST", "HOLD_AT"
SEEN_SECONDS = 1.0
"""Length of the steps before a rank stops itself. A supervisor looks twice a second; of shorter steps it may see none,
and where it does not know the usual step the limit is that of the start, 300 s or more."""


class Hold:
    """One rank's wait. Does nothing where no test asks for it."""

    def __init__(self, environ: Mapping[str, str], environment: RankEnvironment) -> None:
        self._folder = Path(environ[FOLDER]) if FOLDER in environ else None
        self._at = int(environ.get(HOLD_AT, "0"))
        self._environment, self._held, self._stepped = environment, False, False
        self._name = f"{environment.global_rank}.{environment.attempt}"

    def before_step(self, step: int, stop_requested: Callable[[], bool]) -> None:
        """Wait before the step after `step` steps, if it is time for that, until `go` or a request to stop."""
        if self._folder is None or self._held:
            return
        freezes = self._environment.attempt == 0 and (self._folder / f"freeze-{self._environment.global_rank}").exists()
        if step < self._at:
            if freezes:
                time.sleep(SEEN_SECONDS)
            return
        self._held = True
        (self._folder / f"at-{self._name}").touch()
        if freezes:
            os.kill(os.getpid(), signal.SIGSTOP)
        while not (self._folder / "go").exists() and not stop_requested():
            time.sleep(0.05)

    def after_step(self) -> None:
        """Say that the first step of this attempt is done."""
        if self._folder is not None and not self._stepped:
            self._stepped = True
            (self._folder / f"first-{self._name}").touch()
