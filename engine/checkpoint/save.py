"""What one rank does for a save after staging: prepare the folder, write its file, commit. No collective is here.

Write puts this rank's own file, hashed, into a folder that is no checkpoint yet; commit, when all ranks have
reported, adds the manifest and renames the folder. Invariant: a folder `step-N` is whole or does not exist. Who calls
what when is `engine.checkpoint.saver`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint import container, manifest_json
from engine.checkpoint.folder import Owner, check_owner, publish, step_path
from engine.checkpoint.manifest import CheckpointState, Manifest, join_placements
from engine.checkpoint.staging import Staged
from engine.config.resolve import Layout
from engine.errors import CheckpointError
from engine.parallel.state import Placement

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


def write_staged(
    staged: Staged,
    partial: Path,
    step: int,
    holds_pieces: bool = True,
    going_on: Callable[[], None] = lambda: None,
) -> Written:
    """Writes this rank's file, hashed on the way; returns when it is on the disk. Each rank calls it for itself.

    What `going_on` raises between two chunks ends the write.
    """
    record = None
    staged.wait()
    if staged.entries:
        about = {**staged.writer._asdict(), "step": step}
        header = container.header_bytes(staged.entries, staged.data, about)
        record = container.write(partial / staged.writer.file_name, header, staged.data, going_on)
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
    manifest_json.write(manifest, partial)
    manifest_json.check_sizes(manifest_json.read(partial), partial)
    target = step_path(partial.parent, manifest.state.step)
    check_owner(partial.parent, owner)  # last, as close to the rename as can be
    publish(partial, target)
    return target
