"""Retention: the last few checkpoints stay, and the newest one that verifies stays whatever its age."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.folder import committed, remove
from engine.checkpoint.verify import newest_verified
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups

log = logger(__name__)


def victims(newest_first: list[Path], keep_last: int, verified: Path | None) -> list[Path]:
    """The checkpoints to remove; none where nothing verifies, so that what is left can still be mended by hand."""
    assert keep_last >= 1
    if verified is None:
        return []
    return [path for path in newest_first[keep_last:] if path != verified]


def retain(folder: Path, keep_last: int, groups: Groups) -> list[Path]:
    """Removes what is older than the last `keep_last` checkpoints; returns what was removed.

    Call after a commit. Collective over `groups.world`: the ranks verify the newest together, and only where there
    is something to remove.

    Raises:
        CheckpointError: a checkpoint cannot be removed, on every rank.
    """
    found = on_first(lambda: committed(folder), groups.world, CheckpointError)
    if len(found) <= keep_last:
        return []
    verified = newest_verified(folder, groups)

    def prune() -> list[Path]:
        doomed = victims(found, keep_last, verified)
        for path in reversed(doomed):  # oldest first
            remove(path)
            log.info("checkpoint %s removed: the last %d are kept", path.name, keep_last)
        return doomed

    return on_first(prune, groups.world, CheckpointError)
