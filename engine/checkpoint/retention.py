"""Retention: rules for the checkpoints that stay, and removal of the others.

Invariant, whoever else removes or saves at the same time: a checkpoint is removed only where a newer one has been
verified and stays. So of several processes at work each leaves the newest that any of them has verified, and what is
newer than that, damaged perhaps, is left for the user to look at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint.folder import AnyLocation, committed, remove, step_of
from engine.checkpoint.named_files import remove_unnamed
from engine.checkpoint.verify import Removed, verify
from engine.logs import logger

log = logger(__name__)


@dataclass(frozen=True)
class Retention:
    """Rules of retention: a checkpoint stays if any of them keeps it."""

    keep_last: int
    """Number of newest checkpoints that stay; at least 1."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple stay. None means that no multiple does."""
    keep_best: int = 0
    """Number of checkpoints with the least metric that stay, among those that have one; of equal ones the earliest."""
    metric: Mapping[int, float] = field(default_factory=dict)
    """Metric by step; smaller is better."""
    borders: frozenset[int] = frozenset()
    """Steps at which run stages end: their checkpoints stay, since the ledger measures what a run stage has moved."""

    def keeps(self, newest_first: list[AnyLocation]) -> set[AnyLocation]:
        """Return the checkpoints that stay."""
        assert self.keep_last >= 1
        kept = set(newest_first[: self.keep_last])
        kept |= {path for path in newest_first if step_of(path) in self.borders}
        if self.keep_every is not None:
            kept |= {path for path in newest_first if step_of(path) % self.keep_every == 0}
        judged = [path for path in newest_first if step_of(path) in self.metric]
        return kept | set(
            sorted(judged, key=lambda path: (self.metric[step_of(path)], step_of(path)))[: self.keep_best]
        )


def victims(newest_first: list[AnyLocation], retention: Retention, verified: AnyLocation | None) -> list[AnyLocation]:
    """Return the checkpoints to remove, oldest first; none where nothing verifies, and none newer than `verified`."""
    if verified is None:
        return []
    kept = retention.keeps(newest_first)
    # Oldest first: if this is cut short, the newer ones are there.
    return [path for path in reversed(newest_first) if path not in kept and step_of(path) < step_of(verified)]


def prune(folder: AnyLocation, retention: Retention, verified: AnyLocation | None) -> list[AnyLocation]:
    """Remove what `retention` does not keep, and files beside the checkpoints that only those named; return what was
    removed of the former. Any process may call it at any time.

    `verified` is the newest checkpoint whose bytes have been held against their hashes.

    Raises:
        CheckpointError: a checkpoint cannot be removed.
    """
    doomed = victims(committed(folder), retention, verified)
    for path in doomed:
        remove(path)
        log.info("checkpoint %s removed: %s", path.name, retention_in_words(retention))
    if doomed:
        remove_unnamed(folder)
    return doomed


def newest_whole(
    newest_first: list[AnyLocation], watch: Callable[[Any], Callable] = lambda path: iter
) -> AnyLocation | None:
    """Return the newest checkpoint that verifies, found by this process alone; None where there is none.

    One that is removed meanwhile is passed over.
    """
    for path in newest_first:
        # a run that trains meanwhile removes what it no longer keeps
        with contextlib.suppress(Removed):
            if not verify(path, watch(path)):
                return path
    return None


def retention_in_words(retention: Retention) -> str:
    """Return the rules in words, for a message."""
    words = [f"the last {retention.keep_last}"]
    words += [f"every {retention.keep_every} steps"] if retention.keep_every is not None else []
    words += [f"the best {retention.keep_best}"] if retention.keep_best else []
    words += ["the last of each run stage"] if retention.borders else []
    return f"{', '.join(words)} are kept"
