"""The folder `checkpoints/` of a run: names, order, and who may commit to it.

`step-00000123` is committed and whole by construction; every name that starts with a dot is on its way in or
out and no checkpoint. `owner.json` names the newest start of the run, (job, attempt): only the owner may commit,
so that a process that outlived its attempt cannot move the newest checkpoint. The functions here run on one rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from engine.atomic import sync_folder, write_atomically
from engine.checkpoint.container import disk_errors
from engine.checkpoint.storage import MANIFEST, Location, Remote
from engine.errors import CheckpointError

AnyLocation = TypeVar("AnyLocation", Path, Remote, Location)
CHECKPOINTS = "checkpoints"
"""Name of the folder in a run folder."""
_OWNER = "owner.json"
# 8 digits or more, so that names sort as steps do up to 10**8 steps
_COMMITTED = re.compile(r"step-(\d{8,})")
_PASSING = re.compile(r"\.step-.*\.(partial|replaced|removed)")


class Superseded(CheckpointError):
    """Another start of the run has acquired its checkpoints: this one must end."""


@dataclass(frozen=True)
class Owner:
    """One start of a run: the scheduler's job and how often it was started before."""

    job: str
    attempt: int


def step_path(folder: Path, step: int) -> Path:
    """Return the folder of the committed checkpoint of a step."""
    return folder / f"step-{step:08d}"


def partial_path(folder: Path, step: int, owner: Owner) -> Path:
    """Return the folder that a checkpoint is written into before it is committed."""
    # A job's name comes from the scheduler, and may hold a slash.
    job = re.sub(r"[^A-Za-z0-9_.]", "_", owner.job)
    return folder / f".step-{step:08d}.{job}-{owner.attempt}.partial"


def step_of(path: Location) -> int:
    """Return the step in a checkpoint's name, or -1 for a folder of another name."""
    found = _COMMITTED.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def committed(folder: AnyLocation) -> list[AnyLocation]:
    """Return the committed checkpoints, newest first, verified or not; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found: list[AnyLocation] = [path for path in folder.iterdir() if step_of(path) >= 0]  # type: ignore[misc]
    return sorted(found, key=step_of, reverse=True)


def find(location: AnyLocation) -> list[AnyLocation]:
    """Return the checkpoints of a run folder, of its folder `checkpoints/`, or the one that is named, newest first.

    A folder with a manifest is one checkpoint, whatever its name.

    Raises:
        CheckpointError: there is none, or nothing can be read there.
    """
    try:
        if (location / MANIFEST).is_file() or (
            step_of(location) >= 0 and location.is_dir()
        ):  # some servers list no folders
            return [location]
        found = committed(location / CHECKPOINTS) or committed(location)
    except OSError as problem:
        raise CheckpointError(
            f"{location} cannot be read: {problem.strerror or problem}",
            "a folder or URL that can be read from here",
            "check the path or URL, the server and your permissions",
        ) from problem
    if not found:
        listed = " behind a server that lists folders" if isinstance(location, Remote) else ""
        raise CheckpointError(
            f"{location} holds no checkpoint",
            f"a run folder, its folder {CHECKPOINTS}/{listed}, or one checkpoint step-N",
            "check the path, or train until the first checkpoint is saved",
        )
    return found


def run_of(location: Location) -> Location:
    """Return the run folder of a location that `find` takes, named from inside or through links, too.

    Returns `location` itself where it belongs to no run.

    A folder is the run of checkpoints where its `checkpoints/` is the folder that they lie in. Links are followed, and
    left again: where the current folder was entered through one, the shell's PWD says so.
    """
    if isinstance(location, Remote):
        inside = location.parent if step_of(location) >= 0 else location
        return inside.parent if inside.name == CHECKPOINTS else inside
    if (location / CHECKPOINTS).is_dir():
        return location
    real = location.resolve()
    inside = real.parent if (real / MANIFEST).is_file() else real
    # The kernel knows the current folder by its real path; the shell remembers the link. PWD may be stale, so check it.
    entered = Path(os.environ.get("PWD", ""))
    here = entered if entered.is_dir() and entered.samefile(Path()) else Path()
    # abspath and not resolve: it joins `..` without following links
    for name in (Path(os.path.abspath(here / location)), real):
        for run in name.parents[:2]:
            if (run / CHECKPOINTS).resolve() == inside:
                return run
    return location


def acquire(folder: Path, owner: Owner) -> None:
    """Make `owner` the one that may commit, and clear what an earlier start left half done.

    Raises:
        Superseded: a newer attempt of the same job owns the folder.
        CheckpointError: the file system refuses.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        current = owner_of(folder)
        # Attempts count within one job; another job is another decision of the user, and takes over.
        if current is not None and current.job == owner.job and current.attempt > owner.attempt:
            raise _stale(folder, current, owner)
        # before the sweep: what a superseded start still writes can no longer be committed
        write_atomically(folder / _OWNER, json.dumps(asdict(owner)))
        sweep(folder)


def owner_of(folder: Path) -> Owner | None:
    """Return the owner of the folder, who may commit; None if it has none, or the file cannot be read."""
    try:
        return Owner(**json.loads((folder / _OWNER).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def check_owner(folder: Path, owner: Owner) -> None:
    """Raise `Superseded` where another start of the run has acquired the folder since."""
    current = owner_of(folder)
    if current != owner:
        raise _stale(folder, current, owner)


@contextlib.contextmanager
def told_by_owner(folder: Path, owner: Owner) -> Iterator[None]:
    """Turn a `CheckpointError` into `Superseded` where another start of the run has acquired the folder since.

    That start sweeps away what this one writes, which looks like a file system that fails.
    """
    try:
        yield
    except CheckpointError as error:
        current = owner_of(folder)
        if current is not None and current != owner and not isinstance(error, Superseded):
            raise _stale(folder, current, owner) from error
        raise


def _stale(folder: Path, current: Owner | None, owner: Owner) -> Superseded:
    now = f"job {current.job!r} attempt {current.attempt}" if current else "nobody"
    return Superseded(
        f"{folder} belongs to {now}, this is job {owner.job!r} attempt {owner.attempt}",
        "commits of the newest start of a run",
        "end this process: the run goes on elsewhere",
    )


def publish(partial: Path, target: Path) -> None:
    """Move a finished checkpoint to its name, over one of the same step that an earlier start left there.

    The older one steps aside first; `sweep` puts it back should this process die between the two moves.
    """
    with disk_errors(target):
        # The entries of the folder first, then the rename: after a crash there is a whole checkpoint or none.
        sync_folder(partial)
        # A rename cannot replace a folder that is not empty.
        aside = target.with_name(f".{target.name}.replaced")
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        partial.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear what a killed process left: half-written and half-removed checkpoints go, a replaced one comes back."""
    for path in folder.iterdir():
        found = _PASSING.fullmatch(path.name)
        if not found:
            continue
        target = path.with_name(path.name[1:].removesuffix(".replaced"))
        # Died between the two renames of `publish`: the older checkpoint of this step is the only one.
        if found.group(1) == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Location) -> None:
    """Remove a committed checkpoint, if it is there; at no moment is a half-removed one among the committed."""
    if isinstance(path, Remote):
        with disk_errors(path):
            path.remove_tree()
        return
    # Unique per process and call: two that remove at the same time do not meet.
    doomed = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.removed")
    with disk_errors(path):
        try:
            path.rename(doomed)
        except FileNotFoundError:  # another process was faster
            return
        shutil.rmtree(doomed, ignore_errors=True)  # a sweep may be at it, too; what stays, the next one clears
