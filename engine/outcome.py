"""The outcome of a run, written atomically to its folder: launchers lose exit codes.

`outcome.json` holds job, attempt, code, step, the first failing rank and its error; readers take it first and the exit
code second. The start that takes the run folder removes it, so that an old one never speaks for a new run; only the
owner of the folder writes it (`engine.run_folder`).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.atomic import write_atomically
from engine.redact import redacted

FILE = "outcome.json"


def file_name(job: str, attempt: int) -> str:
    """Return the beginning of the names of files about an attempt of a job, `JOB.ATTEMPT`."""
    # A job's name may hold what a file's may not.
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', job)}.{attempt}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of one attempt of a job.

    `code` is one of the `EXIT_*` of `engine.errors`; `step` the last whole step; `rank` the first to fail; `early` is
    True where early stopping has ended the run before its last step."""

    job: str
    attempt: int
    code: int
    step: int
    rank: int | None = None
    error: str = ""
    early: bool = False

    def is_of(self, job: str, attempt: int) -> bool:
        """Return True if it says how that attempt of that job ended."""
        return (self.job, self.attempt) == (job, attempt)

    def ends(self, num_steps: int) -> bool:
        """Return True if a run of so many steps is done, now that its file may have a run stage more than it had when
        this was written: for whoever decides to start it again, or to leave it alone."""
        done = 0  # `EXIT_DONE`, of a room beside this one
        return self.code == done and (self.early or self.step >= num_steps)


def write(folder: Path, outcome: Outcome) -> None:
    """Put the outcome in place in one move, over any but that of a newer attempt of its job; call on one rank."""
    said = read(folder)
    # An attempt that hung on a node that was lost may wake up when the next one has ended.
    if said is not None and said.job == outcome.job and said.attempt > outcome.attempt:
        return
    write_atomically(folder / FILE, json.dumps(redacted(asdict(outcome)), indent=1))


def read(folder: Path) -> Outcome | None:
    """Return the outcome in a run folder, or None where the run has written none (still running, or killed) that can
    be read."""
    try:
        return Outcome(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    # TypeError: JSON of another version, with other keys. Every reader has the exit code to fall back on.
    except (OSError, ValueError, TypeError):
        return None


def clear(folder: Path) -> None:
    """Remove an earlier outcome; for the owner of the folder. Raises `OSError` where the folder is none."""
    (folder / FILE).unlink(missing_ok=True)
