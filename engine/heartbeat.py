"""Signs of life: the step and phase of each rank, written for a supervisor on the same node in about a microsecond.

A rank has one small file, mapped into its memory, in the folder that `PALIMPSEST_HEARTBEATS` names (in memory, too:
no disk is touched). A beat is a count, the steps done, a phase and the time of the node's monotonic clock. A reader may
meet a half-written beat; it reads again. Where the variable is not set nothing is written.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

VARIABLE = "PALIMPSEST_HEARTBEATS"
Phase = Literal["start", "load", "data", "forward and backward", "loss", "optimizer step", "evaluation", "save", "end"]
"""Phase of a rank, from one beat to the next. `loss` is the sum over all ranks, `optimizer step` begins with the
global gradient norm; gradients are reduced inside the backward pass."""
PHASES: tuple[Phase, ...] = get_args(Phase)
_BEAT = struct.Struct("<4q")
"""Count, step, number of the phase, nanoseconds."""


@dataclass(frozen=True)
class Beat:
    """The newest sign of life of one rank; `seconds` are those of the node's monotonic clock."""

    count: int
    step: int
    phase: Phase
    seconds: float

    @property
    def where(self) -> str:
        """Step and phase in words."""
        if self.phase in ("start", "load"):
            return f"while the run starts ({self.phase})"
        if self.phase in ("save", "evaluation", "end"):
            return f"after step {self.step} ({self.phase})"
        return f"in step {self.step + 1} ({self.phase})"


class Heartbeat:
    """Writer of the beats of one rank."""

    def __init__(self, folder: Path | None, global_rank: int) -> None:
        """Make the rank's file in `folder`; without a folder `beat` does nothing. Raises `OSError`."""
        self.folder, self._count, self._map = folder, 0, None
        if folder is not None:
            path = _path(folder, global_rank)
            path.write_bytes(bytes(_BEAT.size))
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _BEAT.size)

    def beat(self, step: int, phase: Phase) -> None:
        """Write that this rank, `step` steps done, begins a phase."""
        if self._map is not None:
            self._count += 1
            # A store to mapped memory and no system call: beats come several times per step.
            _BEAT.pack_into(self._map, 0, self._count, step, PHASES.index(phase), time.monotonic_ns())


def given_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder that a supervisor has given; None where there is no supervisor, or it is gone."""
    folder = Path(environ.get(VARIABLE) or "/nowhere")
    return folder if folder.is_dir() else None


def read(folder: Path, global_rank: int) -> Beat | None:
    """Return the newest beat of a rank; None where it has given none yet."""
    try:
        found = _path(folder, global_rank).read_bytes()
        # Two equal reads in a row: the count grows with every beat, so a half-written one differs from the next read.
        while (again := _path(folder, global_rank).read_bytes()) != found:
            found = again
        count, step, phase, nanoseconds = _BEAT.unpack(found)
    except (OSError, struct.error):
        return None
    # A file of zeros (count 0) is there before the first beat.
    return Beat(count, step, PHASES[phase], nanoseconds / 1e9) if count else None


def _path(folder: Path, global_rank: int) -> Path:
    return folder / f"rank-{global_rank}"
