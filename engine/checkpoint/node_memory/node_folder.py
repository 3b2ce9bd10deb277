"""The folder in a node's memory that holds its part of a run's generations: name, owner, room and removal.

It is named after the user and the run folder, and is like a run's `checkpoints/`: `step-N` is whole for this node,
names with a dot are on their way, `owner.json` says who may commit. Folders of other runs whose processes are gone are
reported and never read. One process of a node calls this.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from engine.checkpoint.container import disk_errors
from engine.checkpoint.folder import Owner, acquire
from engine.checkpoint.stores import BLOCK_BYTES
from engine.errors import EnvironmentProblem

RUN_FILE = "run.json"
"""File in the folder that names its run; locked for as long as its process lives."""
GENERATIONS = 2
"""Largest number of generations that are there at the same time: one whole, one being written."""
_PREFIX = "palimpsest-memory"


def folder_of(base: Path, run: Path, on_host: int) -> Path:
    """Return a node's folder; `on_host` tells apart nodes that are simulated on one machine."""
    key = xxhash.xxh3_64_hexdigest(str(run.absolute()).encode())
    return base / f"{_PREFIX}-{os.getuid()}-{key}-{on_host}"


def take(folder: Path, run: Path, owner: Owner) -> Any:
    """Acquire the folder for this start of the run, made if it is not there; return its lock, which has to be kept.

    Raises:
        EnvironmentProblem: there is no such memory, or the folder is somebody else's.
        CheckpointError: a newer attempt of the job owns it (`Superseded`), or the file system refuses.
    """
    if not folder.parent.is_dir():
        raise EnvironmentProblem(
            f"checkpoint.memory.folder = {folder.parent} is no folder on this node",
            "a folder in the memory of each node, as /dev/shm is",
            "mount one (tmpfs), name another, or leave checkpoint.memory out",
        )
    with disk_errors(folder):
        # /dev/shm is writable for everybody: checked below, since somebody else may have made this very name.
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EnvironmentProblem(
            f"{folder} is not a folder that this user alone can open",
            "one of this user's own, mode 700",
            "have it removed, or name another checkpoint.memory.folder",
        )
    acquire(folder, owner)
    with disk_errors(folder):
        file = (folder / RUN_FILE).open("a+", encoding="utf-8")
        _lock(file)
        file.truncate(0)
        file.write(json.dumps({"run": str(run.absolute()), "job": owner.job}))
        file.flush()
    return file


def left_behind(own: Path) -> list[str]:
    """Describe the folders of this user beside `own` whose processes are gone: they hold memory until removed."""
    pattern = re.compile(rf"{_PREFIX}-{os.getuid()}-[0-9a-f]{{16}}-\d+")
    # all of this run's folders on this host, whatever their `on_host`
    mine = own.name.rpartition("-")[0]
    found = []
    for path in sorted(own.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.name.rpartition("-")[0] != mine and not _is_alive(path):
            whose = _read(path / RUN_FILE)
            run, job = whose.get("run", "nobody knows which run"), whose.get("job")
            found.append(f"{path} holds {used_bytes(path):,} bytes of {run}, job {job}, whose processes are gone")
    return found


def check_room(folder: Path, sizes: Iterable[int]) -> None:
    """Refuse a node whose memory cannot hold two generations of files of these sizes.

    Raises:
        EnvironmentProblem: with how many bytes are wanted and free.
    """
    wanted = GENERATIONS * sum(size + 4 * BLOCK_BYTES for size in sizes)
    # what lies there are generations of this run, which the new ones replace
    free = free_bytes(folder) + used_bytes(folder)
    if free < wanted:
        raise EnvironmentProblem(
            f"{folder.parent} has {free:,} bytes of room, and two generations of checkpoint.memory take {wanted:,} on "
            "this node: its own ranks' files and those of the node before it",
            "room for both, beside what the ranks themselves need of the memory",
            "make it larger (mount -o remount,size=...), shard over more ranks (ZeRO), or leave checkpoint.memory out",
        )


def free_bytes(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, as far as they stay there meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def drop(folder: Path) -> None:
    """Remove the folder, which gives its memory back."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    try:
        with (folder / RUN_FILE).open("r+", encoding="utf-8") as file:
            return not _lock(file)  # closing lets it go again
    except OSError:
        return False


def _lock(file: Any) -> bool:
    try:
        # The kernel lets a lock go when its process ends, however it ends; a pid in a file may be another process's.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
