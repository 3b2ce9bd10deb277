"""Switch files: empty files that a user puts into a run folder to make a run stop, or save, after its current step.

`touch RUN/stop` needs no access to the job that runs, and works under every launcher. A run does not start while
`stop` lies in its folder, so that no launcher and no queue takes up what a user has stopped.
"""

import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import EXIT_USAGE, EnvironmentProblem

STOP = "stop"
SAVE = "save"
_SETTLED_SECONDS = 2.0
"""Seconds in which a file system may give a second change of a folder the time of the first: its clock is coarse."""


class Stopped(EnvironmentProblem):
    """The run was stopped by a switch file, which is still there; another attempt would find it there, too."""

    exit_code = EXIT_USAGE


class SwitchFiles:
    """The switch files of one run folder, as one rank sees them, at the cost of one `stat` per look.

    A folder's modification time changes whenever a file appears in it, so the files themselves are looked for only
    after it has changed.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self._changed_ns: int | None = None
        self._look_until_seconds = 0.0
        self._found: frozenset[str] = frozenset()

    def found(self) -> frozenset[str]:
        """Return the names of the switch files that lie in the folder; none where it cannot be read."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
        except OSError:
            return frozenset()
        if changed_ns != self._changed_ns:
            self._changed_ns, self._look_until_seconds = changed_ns, self._clock() + _SETTLED_SECONDS
        elif self._clock() > self._look_until_seconds:
            return self._found
        self._found = frozenset(name for name in (STOP, SAVE) if (self.folder / name).exists())
        return self._found


def refuse_stopped(folder: Path) -> None:
    """Refuse to start a run in whose folder the switch file `stop` lies.

    Raises:
        Stopped: it lies there.
    """
    if (folder / STOP).exists():
        raise Stopped(
            f"{folder / STOP} is there: the run was stopped by this file",
            "a run folder without it",
            f"to go on with the run, remove it: rm {folder / STOP}",
        )
