"""`saved.json` in a run folder: the step of the newest checkpoint that the run has committed there.

It stays behind when `checkpoints/` is removed, or lies on a disk that is not mounted: only so can a start tell a run
whose checkpoints are gone, which must not start over in silence, from one that was ended before its first.
"""

from __future__ import annotations

import json
from pathlib import Path

from engine.atomic import write_atomically

FILE = "saved.json"


def note(folder: Path, step: int) -> None:
    """Note a committed checkpoint; call on one rank. Raises `OSError` where that cannot be written."""
    write_atomically(folder / FILE, json.dumps({"step": step}))


def newest(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that the run has committed; None where it has committed none."""
    try:
        return int(json.loads((folder / FILE).read_text(encoding="utf-8"))["step"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
