"""`memory.json` in a run folder: the hosts that hold the newest generation, for whoever looks for it later.

A run that is started again on other hosts finds no generation there, and must not go back to the disk in silence: the
hosts that still have the newest steps may be up and only not part of the job.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.atomic import write_atomically
from engine.logs import logger

FILE = "memory.json"

_log = logger(__name__)


@dataclass(frozen=True)
class Held:
    """The newest generation of a run: its step, the job that saved it, and the hosts of its nodes in their order."""

    step: int
    job: str
    hosts: tuple[str, ...]


def note(run: Path, held: Held) -> None:
    """Write the record; call on one rank. Where that fails, a warning is logged: no generation depends on it."""
    try:
        write_atomically(run / FILE, json.dumps(asdict(held)))
    except OSError as error:
        _log.warning("%s cannot be written: %s", run / FILE, error.strerror or error)


def read(run: Path) -> Held | None:
    """Return the record; None where there is none that can be read."""
    try:
        tree = json.loads((run / FILE).read_text(encoding="utf-8"))
        return Held(int(tree["step"]), str(tree["job"]), tuple(map(str, tree["hosts"])))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget(run: Path) -> None:
    """Remove the record, when the generations are given up; call on one rank."""
    try:
        (run / FILE).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", run / FILE, error.strerror or error)


def lost_words(held: Held, restored: int, hosts: tuple[str, ...]) -> str:
    """Return the warning of a start on `hosts` that goes on from step `restored`, though a later one was in memory."""
    absent = [host for host in dict.fromkeys(held.hosts) if host not in hosts]
    where = ", ".join(dict.fromkeys(held.hosts))
    gone = f"of which {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not part of this start"
    return (
        f"the checkpoint of step {held.step} was in the memory of {where}, {gone if absent else 'and is lost'}: going "
        f"on from step {restored}, so {held.step - restored} steps are trained again"
    )
