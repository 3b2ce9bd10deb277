"""Sign of life that a conductor leaves on the shared disk when it has lost a node, for the agent that is still there.

A node that was cut off may reach Slurm again before it reaches the conductor, and a network may be whole but for one
line: an agent that has Slurm's answer alone would take the conductor for lost, and the job with it. The conductor gives
the sign only while Slurm tells it, too, that the job is its own: one that is cut off itself is rightly taken for lost,
although it lives and writes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

FILE = "conductor.beat"
"""File in the folder of the job that the conductor writes anew."""
BEAT_SECONDS = 2.0
TOLD_SECONDS = 30.0
"""Seconds for which the sign is given after a loss; Slurm is asked as long."""
CERTAIN_SECONDS = 4 * BEAT_SECONDS
"""Seconds without a change after which an agent takes the conductor for lost."""


class SignOfLife:
    """Gives the sign while entered, for a while after each loss of a node."""

    def __init__(self, job_folder: Path, num_lost: Callable[[], int], is_ours: Callable[[], bool]) -> None:
        """`num_lost` returns the nodes lost so far; `is_ours` asks Slurm if the job is still this start's."""
        self._path, self._num_lost, self._is_ours = job_folder / FILE, num_lost, is_ours
        self._ended = threading.Event()

    def __enter__(self) -> SignOfLife:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._ended.set()

    def _run(self) -> None:
        lost, until = 0, 0.0
        while not self._ended.wait(BEAT_SECONDS):
            if (found := self._num_lost()) != lost:
                lost, until = found, time.monotonic() + TOLD_SECONDS
            if time.monotonic() < until and self._is_ours():
                with contextlib.suppress(OSError):  # a full disk costs the sign, not the run
                    self._path.write_text(f"{time.time()}\n")


@dataclass
class Silence:
    """The sign of life as it was when an agent lost its connection."""

    job_folder: Path
    since: float = field(default_factory=time.monotonic)
    said: str = field(init=False)

    def __post_init__(self) -> None:
        self.said = self._read()

    @property
    def is_broken(self) -> bool:
        """True if the conductor has given a sign of life since."""
        return self._read() != self.said

    @property
    def is_certain(self) -> bool:
        """True if it would have given one by now."""
        return time.monotonic() - self.since >= CERTAIN_SECONDS

    def _read(self) -> str:
        try:
            return (self.job_folder / FILE).read_text()
        except OSError:
            return ""
