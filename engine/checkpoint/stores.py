"""Where a save goes: what is done there before its files are written, and what makes it stand once they all are.

`engine.checkpoint.saver` drives one save at a time through a `Store`. Invariant: the collectives of a store are those
of its methods that say so; what runs in the background uses none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engine.checkpoint.background import Background
from engine.checkpoint.folder import Owner, claim, partial_path
from engine.checkpoint.manifest import CheckpointState, Manifest
from engine.checkpoint.save import StageTable, Written, build_manifest, commit, prepare, write_staged
from engine.checkpoint.staging import Staged
from engine.config.resolve import Layout
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups

log = logger(__name__)
GoingOn = Callable[[], None]
"""Raises where the write is to end early."""


@dataclass(frozen=True)
class Save:
    """One save, equal on every rank but for its tables, which are those of this rank's pipeline."""

    state: CheckpointState
    owner: Owner
    partial: Path
    """The folder that its files are written into; no checkpoint yet."""
    tables: list[StageTable]
    sizes: list[tuple[int, int]]
    """Per rank the bytes of its data, and the most that its file's header takes."""
    began_seconds: float = field(default_factory=time.perf_counter)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def data_bytes(self) -> list[int]:
        """Per rank."""
        return [data for data, _ in self.sizes]

    def manifest(self, layout: Layout, reports: list[Written]) -> Manifest:
        """Raises `CheckpointError` where some ranks stored moments and others none."""
        return build_manifest(self.state, layout, self.tables, reports, self.owner)


class Store(Protocol):
    """A place for saves. Every rank calls every method, in this order; those that say so are collective over the
    world, and raise `CheckpointError`, the same on every rank, with nothing half done left behind."""

    def partial(self, step: int, owner: Owner) -> Path:
        """The folder that this rank's file is written into."""
        ...

    def prepare(self, save: Save) -> None:
        """Makes that folder, where there is room for the files. Collective."""
        ...

    def write(self, save: Save, staged: Staged, holds_pieces: bool, going_on: GoingOn) -> Written:
        """Writes this rank's file, in the background."""
        ...

    def clear(self, save: Save) -> None:
        """Removes what a save that failed has left. Collective."""
        ...

    def start_commit(self, save: Save, reports: list[Written]) -> Background[Path] | None:
        """Starts what this rank has to do once every rank has written. Collective."""
        ...

    def conclude(self, save: Save, commit: Background[Path] | None) -> Path:
        """The folder of the save, which stands from here on; called when every rank's commit is done. Collective."""
        ...

    def give_up(self, commit: Background[Path]) -> None:
        """For a rank that ends in an error meanwhile. Not collective."""
        ...


class DiskStore:
    """A run's folder `checkpoints/` on a file system that all ranks share: rank 0 commits."""

    def __init__(self, folder: Path, groups: Groups, after_commit: Callable[[Path], object]) -> None:
        self.folder = folder
        self._groups = groups
        self._after_commit = after_commit

    def claim(self, owner: Owner) -> None:
        """Makes `owner` the only one that may commit. Collective over the world."""
        on_first(lambda: claim(self.folder, owner), self._groups.world, CheckpointError)

    def partial(self, step: int, owner: Owner) -> Path:
        return partial_path(self.folder, step, owner)

    def prepare(self, save: Save) -> None:
        on_first(lambda: prepare(save.partial, save.data_bytes), self._groups.world, CheckpointError)

    def write(self, save: Save, staged: Staged, holds_pieces: bool, going_on: GoingOn) -> Written:
        return write_staged(staged, save.partial, save.step, holds_pieces, going_on)

    def clear(self, save: Save) -> None:
        on_first(lambda: shutil.rmtree(save.partial, ignore_errors=True), self._groups.world, CheckpointError)

    def start_commit(self, save: Save, reports: list[Written]) -> Background[Path] | None:
        if self._groups.world.position > 0:
            return None
        return Background(lambda _: self._commit(save, reports), f"commit-{save.step}")

    def conclude(self, save: Save, commit: Background[Path] | None) -> Path:
        return on_first(lambda: commit.result() if commit else save.partial, self._groups.world, CheckpointError)

    def give_up(self, commit: Background[Path]) -> None:
        commit.call_off()  # takes no notice: a commit that has begun is carried to its end

    def _commit(self, save: Save, reports: list[Written]) -> Path:
        try:
            path = commit(save.partial, save.manifest(self._groups.layout, reports))
        except BaseException:
            shutil.rmtree(save.partial, ignore_errors=True)
            raise
        log.info("saved %s, %.1f s after its step", path, time.perf_counter() - save.began_seconds)
        try:
            self._after_commit(path)
        except Exception as error:  # the checkpoint stands; what is done about it later must not undo that
            log.error("after the commit of %s: %s", path.name, error)
        return path
