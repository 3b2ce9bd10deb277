"""Stores of saves: the work before files are written, writing one rank's file, and the commit once all are there.

`engine.checkpoint.saver` drives one save at a time through a `Store`. Invariants: a folder `step-N` is whole or does
not exist, since files go into a folder that is no checkpoint yet and the commit adds the manifest and renames it; the
collectives of a store are those of its methods that say so; what runs in the background uses none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint import container, manifest_json
from engine.checkpoint.background import Background
from engine.checkpoint.folder import Owner, acquire, check_owner, partial_path, publish, step_path, told_by_owner
from engine.checkpoint.manifest import CheckpointState, Manifest, join_placements
from engine.checkpoint.staging import Staged
from engine.config.resolve import Layout
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel.agreement import on_first
from engine.parallel.groups import Groups
from engine.parallel.state import Placement

log = logger(__name__)
CheckCancelled = Callable[[], None]
"""Function that raises `Cancelled` if the write is to end early; called between two chunks."""
# 4 KiB: the default of ext4 and XFS, and the page of a tmpfs
BLOCK_BYTES = 4096
"""Bytes of a block of the file system; files take whole blocks."""


@dataclass(frozen=True)
class StageTable:
    """Placements and optimizer settings of the parameters of one pipeline stage."""

    placements: list[Placement]
    hyperparameters: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """One rank's report to the commit; no record where it stored nothing."""

    record: container.FileRecord | None
    moments: tuple[str, ...] | None
    """Names of the moments that it stored; None where it holds no shard at all, or frozen ones only."""


def prepare(partial: Path, sizes: list[int]) -> None:
    """Make the folder that ranks write into, where the file system has room for files of these data sizes.

    Raises:
        CheckpointError: there is no room, or the file system refuses. Call on one rank.
    """
    with container.disk_errors(partial):
        # A save of this very name may have been cut short before.
        shutil.rmtree(partial, ignore_errors=True)
        room = os.statvfs(partial.parent)
        # Headers and manifest are small beside the data; one per cent and a few blocks per file cover them.
        wanted = sum(size + size // 100 + 4 * BLOCK_BYTES for size in sizes if size)
        if room.f_bavail * room.f_frsize < wanted:
            raise CheckpointError(
                f"no space left for {partial}: the checkpoint takes {wanted} bytes, "
                f"{room.f_bavail * room.f_frsize} are free",
                remedy="free some space or lower checkpoint.keep_last, then train again; earlier checkpoints are whole",
            )
        partial.mkdir()


def write_staged(
    staged: Staged,
    partial: Path,
    step: int,
    holds_shards: bool = True,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Written:
    """Write this rank's file, hashed on the way; return when it is on the disk. Each rank calls it for itself.

    What `check_cancelled` raises between two chunks ends the write.
    """
    record = None
    # also where there is nothing to write: `hold_update` waits for it
    staged.wait()
    if staged.entries:
        about = {**staged.writer._asdict(), "step": step}
        header = container.header_bytes(staged.entries, staged.data, about)
        record = container.write(partial / staged.writer.file_name, header, staged.data, check_cancelled)
    return Written(record, staged.moments if holds_shards else None)


def build_manifest(
    state: CheckpointState, layout: Layout, tables: list[StageTable], reports: list[Written], owner: Owner
) -> Manifest:
    """Return the manifest from one table per pipeline stage (in order) and one report per rank.

    Raises:
        CheckpointError: some ranks stored moments and others none.
    """
    stored = {report.moments for report in reports if report.moments is not None}
    # (): shards without moments, a save of weights alone; stages of one run may differ in moments, not in having any.
    if () in stored and len(stored) > 1:
        raise CheckpointError(f"some ranks carry no moments, others {sorted(stored - {()})}")
    # A tied parameter is on several stages, with the same settings.
    hyperparameters = {name: values for table in tables for name, values in table.hyperparameters.items()}
    return Manifest(
        state=replace(state, hyperparameters=hyperparameters),
        layout=layout,
        placements=join_placements([table.placements for table in tables]),
        moments=tuple(sorted({moment for moments in stored for moment in moments})),
        files={report.record.name: report.record for report in reports if report.record is not None},
        job=owner.job,
        attempt=owner.attempt,
    )


def commit(partial: Path, manifest: Manifest) -> Path:
    """Write the manifest and rename the folder to its final name. Call on one rank, when all have written.

    Raises:
        CheckpointError: a newer start of the run owns the folder, or the file system refuses.
    """
    owner = Owner(manifest.job, manifest.attempt)
    manifest_json.write(manifest, partial)
    # Read back from the disk: what a restart could not read must fail here, while the older checkpoints are kept.
    manifest_json.check_sizes(manifest_json.read(partial), partial)
    target = step_path(partial.parent, manifest.state.step)
    check_owner(partial.parent, owner)  # last, as close to the rename as can be
    publish(partial, target)
    return target


@dataclass(frozen=True)
class Save:
    """One save, equal on every rank but for its tables, which are those of this rank's pipeline."""

    state: CheckpointState
    owner: Owner
    partial: Path
    """Folder that its files are written into; no checkpoint yet."""
    tables: list[StageTable]
    sizes: list[tuple[int, int]]
    """Bytes of each rank's data, and the most that its file's header takes, by global rank."""
    began_seconds: float = field(default_factory=time.perf_counter)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def data_bytes(self) -> list[int]:
        """Bytes of each rank's data."""
        return [data for data, _ in self.sizes]

    def manifest(self, layout: Layout, reports: list[Written]) -> Manifest:
        """Return the manifest. Raises `CheckpointError` where some ranks stored moments and others none."""
        return build_manifest(self.state, layout, self.tables, reports, self.owner)


class Store(Protocol):
    """A destination of saves. Every rank calls every method, in this order.

    Those that say so are collective over the world, and raise `CheckpointError`, the same on every rank, with nothing
    half done left behind.
    """

    def partial(self, step: int, owner: Owner) -> Path:
        """Return the folder that this rank's file is written into."""
        ...

    def prepare(self, save: Save) -> None:
        """Make that folder, where there is room for the files. Collective."""
        ...

    def write(self, save: Save, staged: Staged, holds_shards: bool, check_cancelled: CheckCancelled) -> Written:
        """Write this rank's file, in the background."""
        ...

    def clear(self, save: Save) -> None:
        """Remove what a save that failed has left. Collective."""
        ...

    def start_commit(self, save: Save, reports: list[Written]) -> Background[Path] | None:
        """Start this rank's part of the commit, once every rank has written. Collective."""
        ...

    def conclude(self, save: Save, commit: Background[Path] | None) -> Path:
        """Return the folder of the save, which is valid from now on; call once every commit is done. Collective."""
        ...

    def give_up(self, commit: Background[Path]) -> None:
        """Give up a commit, on a rank that ends in an error meanwhile. Not collective."""
        ...


class DiskStore:
    """A run's folder `checkpoints/` on a file system that all ranks share: rank 0 commits."""

    def __init__(self, folder: Path, groups: Groups, after_commit: Callable[[Path], object]) -> None:
        self.folder = folder
        self._groups = groups
        self._after_commit = after_commit

    def acquire(self, owner: Owner) -> None:
        """Make `owner` the only one that may commit. Collective over the world."""
        on_first(lambda: acquire(self.folder, owner), self._groups.world, CheckpointError)

    def partial(self, step: int, owner: Owner) -> Path:
        return partial_path(self.folder, step, owner)

    def prepare(self, save: Save) -> None:
        def make() -> None:
            with told_by_owner(self.folder, save.owner):
                prepare(save.partial, save.data_bytes)

        on_first(make, self._groups.world, CheckpointError)

    def write(self, save: Save, staged: Staged, holds_shards: bool, check_cancelled: CheckCancelled) -> Written:
        with told_by_owner(self.folder, save.owner):
            return write_staged(staged, save.partial, save.step, holds_shards, check_cancelled)

    def clear(self, save: Save) -> None:
        on_first(lambda: shutil.rmtree(save.partial, ignore_errors=True), self._groups.world, CheckpointError)

    def start_commit(self, save: Save, reports: list[Written]) -> Background[Path] | None:
        if self._groups.world.position > 0:
            return None
        return Background(lambda _: self._commit(save, reports), f"commit-{save.step}")

    def conclude(self, save: Save, commit: Background[Path] | None) -> Path:
        return on_first(lambda: commit.result() if commit else save.partial, self._groups.world, CheckpointError)

    def give_up(self, commit: Background[Path]) -> None:
        commit.cancel()  # takes no notice: a commit that has begun is carried to its end

    def _commit(self, save: Save, reports: list[Written]) -> Path:
        try:
            with told_by_owner(self.folder, save.owner):
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
