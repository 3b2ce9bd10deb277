"""How a run ended, written atomically to its folder: launchers lose exit codes (contract "Outcome").

`outcome.json` holds job, attempt, code, step, the first failing rank and its error; whoever needs to know how
a run ended reads it first and the exit code second. It is removed when a run starts, so that an old one never
speaks for a new run.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """`code` is one of the `EXIT_*` of `engine.errors`; `step` the last whole step; `rank` the first to fail."""

    job: str
    attempt: int
    code: int
    step: int
    rank: int | None = None
    error: str = ""


def write(folder: Path, outcome: Outcome) -> None:
    """Puts the outcome in place in one move, over any that is there; call on one rank."""
    partial = folder / f"{FILE}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(outcome), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def write_failure(folder: Path, outcome: Outcome) -> None:
    """Writes the outcome of a failure unless another rank was first, or the run has no folder yet; call on any rank."""
    if folder.is_dir() and read(folder) is None:
        write(folder, outcome)


def read(folder: Path) -> Outcome | None:
    """The outcome in a run folder, or None where the run has written none (still running, or killed)."""
    try:
        return Outcome(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def clear(folder: Path) -> None:
    """Removes an earlier outcome; call before a run starts. Raises `OSError` where the folder is none, or refuses."""
    (folder / FILE).unlink(missing_ok=True)
