"""The file beside what is written in other formats: what they have no place for, so that the way back needs no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.checkpoint.container import disk_errors
from engine.checkpoint.interchange.sources.unnamed import FACTS


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write facts about a model as JSON; raises `CheckpointError` where the file system refuses."""
    with disk_errors(folder / FACTS):
        (folder / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
