"""Provenance of a run: the code, the versions and the environment of each of its starts, for whoever asks later.

A start leaves `starts/JOB.ATTEMPT.json` in the run folder. Nothing reads it back: no run depends on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import engine
from engine.atomic import write_atomically
from engine.logs import logger
from engine.outcome import file_name
from engine.redact import redacted

FOLDER = "starts"
PACKAGES = ("engine", "launcher", "tools")
ROOT = Path(engine.__file__).parents[1]
"""Folder of the packages that this process runs: a checkout, a snapshot, or `site-packages`."""
VERSIONS = ("torch", "deepspeed", "transformers", "numpy", "datasets", "sentencepiece", "mpi4py")
VARIABLES = re.compile(
    r"(SLURM|PALIMPSEST|NCCL|RCCL|GLOO|FI|UCX|OMPI|PMI|PMIX|CUDA|HIP|ROCR|TORCH|TORCHELASTIC|PYTORCH|DS|HF|OMP|MKL|TRITON)_\w+"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX"
)
"""Variables that change how a run computes or communicates; no others are recorded."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL|OVERRIDES", re.IGNORECASE)
"""Parts of the names of variables whose values are not recorded. PALIMPSEST_OVERRIDES holds what no user may see."""
GIT_SECONDS = 20.0
"""Time that git may take, on a file system that is slow."""

_log = logger(__name__)


@dataclass(frozen=True)
class GitState:
    """The commit that a checkout stands on, and a hash of what was changed since."""

    commit: str
    branch: str
    changed: tuple[str, ...]
    """Tracked files that differ from the commit."""
    diff_hash: str
    """First 16 hex digits of the SHA-256 of `git diff HEAD`; empty where nothing was changed."""


def sources(root: Path = ROOT) -> Iterator[Path]:
    """Yield the source files of Palimpsest under a folder, sorted."""
    yield from sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


@cache
def code_hash(root: Path = ROOT) -> str:
    """Hash of the sources of Palimpsest under a folder, as 16 hex digits."""
    digest = hashlib.sha256()
    # Name and content, each ended by a zero byte: no renaming or moving of text between files keeps the hash.
    for path in sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def git_state(folder: Path = ROOT) -> GitState | None:
    """Return the state of the checkout at a folder; None where it is none, or there is no git."""
    if not (folder / ".git").exists():
        return None
    commit, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    changed, diff = _git(folder, "diff", "--name-only", "HEAD"), _git(folder, "diff", "HEAD")
    if commit is None or changed is None or diff is None:
        return None
    digest = hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else ""
    return GitState(commit.strip(), (branch or "").strip(), tuple(changed.split("\n")[:-1]), digest)


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that a run depends on, by name, for those that are installed."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what this process runs: code, versions, machine and the variables that matter, as JSON without secrets."""
    git = git_state()
    variables = {
        name: "***" if SECRET.search(name) else value
        for name, value in sorted(environ.items())
        if VARIABLES.fullmatch(name)
    }
    return redacted(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "command": sys.argv,
            "folder": os.getcwd(),
            "code": {"root": str(ROOT), "hash": code_hash(), "git": None if git is None else asdict(git)},
            "python": sys.version.split()[0],
            "versions": installed_versions(),
            "environment": variables,
        }
    )


def note_start(run_folder: Path, job: str, attempt: int) -> None:
    """Write the provenance of a start into the run folder; where that fails, a warning is logged."""
    path = run_folder / FOLDER / f"{file_name(job, attempt)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(provenance(), indent=1))
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror or error)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails, or is not there."""
    # GIT_DIR and its like of a hook would name another repository.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", "core.quotePath=false", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=GIT_SECONDS, check=True, env=environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
