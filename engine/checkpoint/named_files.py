"""Files that sections of checkpoints name: they lie beside the checkpoints, in `files/`, and several may share one.

A section that is an object with the key `files`, a list of `[name, bytes, xxh3]`, names them (the reservoir does, which
is too large for a manifest and hardly changes between two checkpoints). A file never changes once it is written.
Invariant: a file that a committed checkpoint names is never removed, nor one that a save to come will name: only what
is older than the newest file of the newest checkpoint goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import manifest_json
from engine.checkpoint.container import FileRecord, file_digest
from engine.checkpoint.folder import committed
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError
from engine.logs import logger

FOLDER = "files"
KEY = "files"
_log = logger(__name__)


def named_by(sections: Mapping[str, Any]) -> list[FileRecord]:
    """Return the files that sections name, each once. Raises `CheckpointError` where a section is damaged."""
    found: dict[str, FileRecord] = {}
    for section, state in sections.items():
        if not isinstance(state, Mapping) or KEY not in state:
            continue
        try:
            for name, num_bytes, xxh3 in state[KEY]:
                # a name from elsewhere must not lead out of the folder
                if Path(str(name)).name != name:
                    raise ValueError(f"{name!r} is no plain file name")
                found[name] = FileRecord(name, int(num_bytes), str(xxh3))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the section {section} of the checkpoint names no files: {error}",
                "[name, bytes, xxh3] of each",
                "use an older checkpoint",
            ) from error
    return list(found.values())


def share(checkpoint: Path, records: Iterable[FileRecord], folder: Path) -> None:
    """Give the files that a checkpoint names a second name beside the checkpoints of another folder `checkpoints/`.

    Raises `OSError`.
    """
    for record in records:
        link(checkpoint.parent / FOLDER / record.name, folder / FOLDER / record.name)


def link(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; copy it where that is on another file system, or one without links.

    Raises `OSError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def damage_of(checkpoint: Location, records: Iterable[FileRecord]) -> list[tuple[str, str]]:
    """Return (name, damage) of the files that are not as they were written; reads every byte of them."""
    found = []
    for record in records:
        path = checkpoint.parent / FOLDER / record.name
        try:
            if not path.is_file():
                what = "is missing"
            elif path.stat().st_size != record.num_bytes:
                what = f"has {path.stat().st_size} bytes, {record.num_bytes} were written"
            elif file_digest(path) != record.xxh3:
                what = "its bytes are not those that were written (xxh3 differs)"
            else:
                continue
        except OSError as problem:
            what = f"cannot be read ({problem.strerror})"
        found.append((f"{FOLDER}/{record.name}", what))
    return found


def remove_unnamed(folder: Location) -> list[str]:
    """Remove the files of a folder `checkpoints/` that none of its checkpoints names; return their names.

    Nothing is removed where a manifest cannot be read, or at a URL.
    """
    newest_first = committed(folder)
    if not isinstance(folder, Path) or not (folder / FOLDER).is_dir() or not newest_first:
        return []
    removed = []
    with contextlib.suppress(CheckpointError, OSError):
        named = [[record.name for record in named_by(manifest_json.read(path).state.sections)] for path in newest_first]
        kept = {name for names in named for name in names}
        # the next save may have written its files already, while the newest checkpoint was still on its way
        until = max(((folder / FOLDER / name).stat().st_mtime for name in named[0]), default=0.0)
        for path in sorted((folder / FOLDER).iterdir()):
            if path.name not in kept and path.stat().st_mtime < until:
                path.unlink(missing_ok=True)
                removed.append(path.name)
    if removed:
        _log.info("%d files that no checkpoint names are removed from %s", len(removed), folder / FOLDER)
    return removed
