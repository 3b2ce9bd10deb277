"""Snapshots of the code: a job that waits in a queue for a day runs what was there when it was submitted.

A snapshot is a folder named after the hash of its content, so that jobs with the same code share one, and nothing
that is edited later reaches them. It holds the packages alone, which ranks find through PYTHONPATH.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from engine.errors import EnvironmentProblem
from engine.provenance import PACKAGES, ROOT, code_hash

FOLDER = "code"
"""Folder of snapshots beside the jobs of a run."""


def take(store: Path, root: Path = ROOT) -> Path:
    """Return the snapshot of the packages under `root`, after copying them into `store` if it is not there.

    Safe beside others that take the same: a snapshot appears under its name in one move.

    Raises:
        EnvironmentProblem: it cannot be written, or the code changes meanwhile.
    """
    found = store / code_hash(root)
    if found.is_dir():
        return found
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=store) as folder:
            partial = Path(folder) / "code"
            for package in PACKAGES:
                shutil.copytree(root / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
            if code_hash(partial) != found.name:
                raise EnvironmentProblem(
                    f"the code in {root} changed while it was copied", "code at rest", "start the command again"
                )
            try:
                os.rename(partial, found)
            except OSError:
                # another job was first: its content is the same
                if not found.is_dir():
                    raise
    except OSError as error:
        raise EnvironmentProblem(
            f"the code cannot be copied to {store}: {error.strerror or error}",
            "a folder in which this node can write",
            "make room there, or change its rights",
        ) from error
    return found
