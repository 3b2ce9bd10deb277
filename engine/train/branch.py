"""A branch of a run: another run folder that stands at one of its checkpoints, and goes on from there by itself.

A branch shares the files of the checkpoint with the run (hard links, which take no room) and has a copy of the records
up to that step, so that a ledger of the branch knows what came before. Files of a checkpoint never change once they are
written, so neither run can disturb the other: each removes its own names alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from engine.checkpoint import manifest_json
from engine.checkpoint.folder import CHECKPOINTS, step_of
from engine.checkpoint.named_files import link, named_by, share
from engine.data.shards.tombstones import FILE as TOMBSTONES
from engine.errors import ConfigError, EnvironmentProblem
from engine.train import saved
from engine.train.records import METRICS, read_metrics


def branch(checkpoint: Path, folder: Path) -> None:
    """Make `folder` a run folder that stands at a committed checkpoint of another run.

    Raises:
        ConfigError: the folder exists and is not empty.
        CheckpointError: the manifest of the checkpoint cannot be read.
        EnvironmentProblem: the folder cannot be written.
    """
    run = checkpoint.parent.parent
    named = named_by(manifest_json.read(checkpoint).state.sections)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists", "a folder that is not there yet", "remove it, or choose another name")
    try:
        target = folder / CHECKPOINTS
        _link_folder(checkpoint, target / checkpoint.name)
        share(checkpoint, named, target)
        step = step_of(checkpoint)
        lines = [json.dumps(record) for record in read_metrics(run) if record["step"] <= step]
        (folder / METRICS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        # without it the branch would train on documents that the run has been told to forget
        if (run / TOMBSTONES).exists():
            shutil.copy2(run / TOMBSTONES, folder / TOMBSTONES)
        saved.note(folder, step)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder} cannot be made a run folder: {error.strerror or error}",
            "a folder that can be written",
            "make room, or choose another one; remove what is there first",
        ) from error


def _link_folder(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link(path, target / path.relative_to(source))
