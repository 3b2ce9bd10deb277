"""Verification: every byte of a checkpoint against the hashes that were taken while it was written.

`verify` runs offline in one process and names each damaged file and the shards in it; `is_whole` shares out the files
of one checkpoint over the ranks of a run. Neither changes anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint import manifest_json
from engine.checkpoint.container import file_digest
from engine.checkpoint.load import Files
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.named_files import damage_of, named_by
from engine.checkpoint.storage import Location
from engine.errors import CheckpointError
from engine.logs import logger
from engine.parallel import collectives
from engine.parallel.groups import Groups

log = logger(__name__)


@dataclass(frozen=True)
class Damage:
    """One damaged file of a checkpoint, and the kind of damage."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class Removed(CheckpointError):
    """The checkpoint was removed while it was read, as the retention of a live run does."""

    def __init__(self, path: Location) -> None:
        super().__init__(f"{path} was removed while it was read", "a checkpoint that stays", "name a newer one")

    def __reduce__(self):
        return CheckpointError, (self.wrong, self.allowed, self.remedy)


def verify(path: Location, watch: Callable[[list[str]], Iterable[str]] = iter) -> list[Damage]:
    """Return all damage of a checkpoint, found by reading every byte of it; empty where it is whole.

    `watch` hands on the names of the files as they are read, so that a caller can show progress. A checkpoint that is
    replaced meanwhile by another save of its step is read again.

    Raises:
        Removed: it was removed meanwhile.
    """
    while True:
        before = identity(path)
        damage = _damage(path, watch)
        # Found whole: its bytes were those of one checkpoint, whatever happened since. Damage may come of reading two.
        if not damage or still_there(path, before):
            return damage


def identity(path: Location) -> str:
    """Return a value that is equal for as long as `path` holds one saved checkpoint: the hash of its manifest.

    The manifest holds every file's hash, so another save differs in it unless all its bytes are alike. What the file
    system says of a folder would not do: an inode that is free again is given to the next one. "" where there is none.
    """
    try:
        with (path / manifest_json.FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
    except OSError:  # a server that is busy or gone, or rights: that is for the reader to say
        return "unread"


def still_there(path: Location, before: str) -> bool:
    """Return True if `path` holds the checkpoint whose `identity` was `before`, False if another one has replaced it.

    Raises:
        Removed: it is gone.
    """
    now = identity(path)
    if not now and (before or not path.is_dir()):
        raise Removed(path)
    return now == before


def _damage(path: Location, watch: Callable[[list[str]], Iterable[str]]) -> list[Damage]:
    try:
        manifest = manifest_json.read(path)
    except CheckpointError as problem:
        return [Damage(manifest_json.FILE, _reason(problem))]
    return [*verify_files(path, manifest, watch(list(manifest.files))), *_damage_beside(path, manifest)]


def _damage_beside(path: Location, manifest: Manifest, first: int = 0, stride: int = 1) -> list[Damage]:
    """Return the damage among files beside the checkpoint that its sections name: every `stride`-th from `first` on."""
    try:
        return [Damage(*found) for found in damage_of(path, named_by(manifest.state.sections)[first::stride])]
    except CheckpointError as problem:
        return [Damage(manifest_json.FILE, _reason(problem))]


def verify_files(path: Location, manifest: Manifest, names: Iterable[str]) -> list[Damage]:
    """Return the damage among some files of a checkpoint whose manifest has been read."""
    files = Files(path, manifest)
    return [damage for name in names if (damage := _verify_file(files, name)) is not None]


def _verify_file(files: Files, name: str) -> Damage | None:
    path, record = files.path / name, files.manifest.files[name]
    try:
        manifest_json.check_size(record, path)
        # Both, always: a hash that is right says nothing of a manifest that asks the file for other shards.
        whole = file_digest(path) == record.xxh3
        files.check_file(name)
        # Only where it is not, as it reads the file a second time: per shard, so that a user knows what is lost.
        shards = [] if whole else files.file(name).damaged_entries()
    except CheckpointError as problem:
        return Damage(name, _reason(problem))
    except OSError as problem:
        return Damage(name, f"cannot be read ({problem.strerror})")
    if whole:
        return None
    where = f"in {', '.join(shards[:8])}{', ...' if len(shards) > 8 else ''}" if shards else "in its header"
    return Damage(name, f"bytes {where} are not those that were written (xxh3 differs)")


def _reason(problem: CheckpointError) -> str:
    """Return the first part of an error, without the path that it begins with."""
    head, separator, what = problem.wrong.partition(": ")
    return what if separator and "/" in head else problem.wrong


def is_whole(path: Path, groups: Groups) -> bool:
    """Return True if a checkpoint verifies; each rank reads its share of the files, and rank 0 logs what is damaged.
    Collective over `groups.world`."""
    damage = _verify_together(path, groups)
    if damage and groups.world.position == 0:
        rest = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        log.warning("checkpoint %s is damaged and passed over: %s%s", path.name, damage[0], rest)
    return not damage


def _verify_together(path: Path, groups: Groups) -> list[Damage]:
    world = groups.world
    try:
        manifest = manifest_json.read(path)
        mine = verify_files(path, manifest, list(manifest.files)[world.position :: world.size])
        mine += _damage_beside(path, manifest, world.position, world.size)
    # No return here: the other ranks wait in the gather below.
    except CheckpointError as problem:
        mine = [Damage(manifest_json.FILE, _reason(problem))]
    found = [damage for damages in collectives.gather_objects(mine, world) for damage in damages]
    # a damaged manifest is found by every rank
    return sorted(set(found), key=str)
