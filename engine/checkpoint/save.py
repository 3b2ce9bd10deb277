"""Saving in three steps that stay apart even while they run one after the other: stage, write, commit.

Stage copies live pieces to the host; write puts this rank's own file, hashed, into a folder that is no checkpoint
yet; commit, when all ranks have reported, lets rank 0 add the manifest and rename the folder. Invariant: a folder
`step-N` is whole or does not exist, and any rank's error is every rank's error. Does not decide when to save, nor
what to remove (`engine.checkpoint.retention`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint import container, document
from engine.checkpoint.folder import Owner, check_owner, claim, partial_path, publish, step_path
from engine.checkpoint.manifest import CheckpointState, Manifest, join_placements
from engine.checkpoint.staging import HostBuffer, Staged, stage_pieces
from engine.checkpoint.writers import Writer
from engine.config.resolve import Layout
from engine.errors import CheckpointError, PalimpsestError
from engine.parallel import collectives
from engine.parallel.agreement import on_all, on_first
from engine.parallel.groups import Groups
from engine.parallel.state import Piece, Placement

BLOCK_BYTES = 4096
"""Files take whole blocks of the file system."""


@dataclass(frozen=True)
class StageTable:
    """What one pipeline stage tells the others: its placements and its parameters' optimizer settings."""

    placements: list[Placement]
    hyperparameters: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """One rank's report to the commit; no record where it stored nothing."""

    record: container.FileRecord | None
    moments: tuple[str, ...] | None
    """None where it holds no piece at all."""


class Saver:
    """Saves a run's checkpoints into its folder `checkpoints/`; one per process, on every rank."""

    def __init__(self, folder: Path, groups: Groups) -> None:
        self.folder = folder
        self.groups = groups
        self._buffer = HostBuffer()
        self._owner: Owner | None = None

    def claim(self, job: str, attempt: int) -> None:
        """Makes this start of the run the only one that may commit. Collective over `groups.world`.

        Call when the run starts, before anything is loaded; `save` does it where it was not called.

        Raises:
            CheckpointError: on every rank, where a newer attempt of the job owns the folder.
        """
        owner = Owner(job, attempt)
        if owner != self._owner:
            on_first(lambda: claim(self.folder, owner), self.groups.world, CheckpointError)
            self._owner = owner

    def save(
        self, pieces: list[Piece], placements: list[Placement], state: CheckpointState, job: str, attempt: int
    ) -> Path:
        """The folder of the committed checkpoint. Collective over `groups.world`.

        `pieces` are all live pieces of this rank and `placements` all parameters of its pipeline stage; what each
        rank stores of them follows from the placements.

        Raises:
            CheckpointError: the same on every rank; earlier checkpoints are untouched and nothing half done remains.
        """
        self.claim(job, attempt)
        groups, owner = self.groups, Owner(job, attempt)
        tensor_size = groups.layout.tensor
        writer = Writer.of(groups)
        staged = on_all(
            lambda: stage_pieces(pieces, placements, writer, tensor_size, self._buffer), groups.world, CheckpointError
        )
        tables = collectives.gather_objects(StageTable(placements, state.hyperparameters), groups.pipe)
        sizes = collectives.gather_objects(staged.num_bytes, groups.world)
        partial = partial_path(self.folder, state.step, owner)
        try:
            on_first(lambda: prepare(partial, sizes), groups.world, CheckpointError)
            written = on_all(
                lambda: write_staged(staged, partial, state.step, bool(pieces)), groups.world, CheckpointError
            )
            reports = collectives.gather_objects(written, groups.world)
            return on_first(
                lambda: commit(partial, build_manifest(state, groups.layout, tables, reports, owner)),
                groups.world,
                CheckpointError,
            )
        except PalimpsestError:
            if groups.world.position == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def prepare(partial: Path, sizes: list[int]) -> None:
    """Makes the folder that ranks write into, where the file system has room for files of these data sizes.

    Raises:
        CheckpointError: there is no room, or the file system refuses. Call on one rank.
    """
    with container.disk_errors(partial):
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


def write_staged(staged: Staged, partial: Path, step: int, holds_pieces: bool = True) -> Written:
    """Writes this rank's file, hashed on the way; returns when it is on the disk. Each rank calls it for itself."""
    record = None
    if staged.entries:
        about = {**staged.writer._asdict(), "step": step}
        header = container.header_bytes(staged.entries, staged.data, about)
        record = container.write(partial / staged.writer.file_name, header, staged.data)
    return Written(record, staged.moments if holds_pieces else None)


def build_manifest(
    state: CheckpointState, layout: Layout, tables: list[StageTable], reports: list[Written], owner: Owner
) -> Manifest:
    """The manifest from one table per pipeline stage (in order) and one report per rank.

    Raises:
        CheckpointError: some ranks stored moments and others none.
    """
    stored = {report.moments for report in reports if report.moments is not None}
    if () in stored and len(stored) > 1:
        raise CheckpointError(f"some ranks carry no moments, others {sorted(stored - {()})}")
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
    """Writes the manifest and moves the folder to its place, in one rename. Call on one rank, when all have written.

    Raises:
        CheckpointError: a newer start of the run owns the folder, or the file system refuses.
    """
    owner = Owner(manifest.job, manifest.attempt)
    document.write(manifest, partial)
    document.check_sizes(document.read(partial), partial)
    target = step_path(partial.parent, manifest.state.step)
    check_owner(partial.parent, owner)  # last, as close to the rename as can be
    publish(partial, target)
    return target
