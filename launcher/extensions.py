"""DeepSpeed's build cache: a folder of the run's own, and builds that somebody killed.

torch builds extensions under a file named `lock`. A killed build leaves it, and whoever needs that extension next
waits for ever without a word. Nothing here builds anything: the folder is named to torch through
`TORCH_EXTENSIONS_DIR`, and a lock that nobody can be holding is refused before the run starts.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import MutableMapping
from pathlib import Path

from engine import logs
from engine.errors import EnvironmentProblem

VARIABLE = "TORCH_EXTENSIONS_DIR"
STALE_SECONDS = 600.0
"""Seconds without a new file after which a build counts as dead: a live one writes all the time."""

_log = logs.logger(__name__)


def prepare_extensions(run_folder: Path, environ: MutableMapping[str, str], first: bool = True) -> None:
    """Name the run's own build folder to torch unless the user names one, and refuse stale locks in it.

    `first`: no other rank of this run can be building yet, so any lock in the run's own folder is a stale one.

    Raises:
        EnvironmentProblem: a killed build left its lock.
    """
    own = run_folder / "extensions"
    folder = Path(environ.setdefault(VARIABLE, str(own.absolute())))
    in_use = []
    for lock in locks(folder):
        idle_seconds = _idle_seconds(lock.parent)
        # A folder that the user names may be shared with other runs, whose builds are alive as long as they write.
        if (first and folder == own.absolute()) or idle_seconds > STALE_SECONDS:
            raise EnvironmentProblem(
                f"the build lock {lock} was left by a build that was killed ({idle_seconds / 60:.0f} minutes idle)",
                "no lock without a build: every process that needs this extension would wait for ever",
                f"rm -r {shlex.quote(str(lock.parent))}   (it is built again when needed)",
            )
        in_use.append(lock)
    if in_use:
        _log.warning("somebody is building extensions now (%s): ranks that need them wait for it", in_use[0])


def locks(folder: Path) -> list[Path]:
    """Return the build locks under a cache folder (torch keeps each extension one or two levels down)."""
    return sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])


def _idle_seconds(folder: Path) -> float:
    """Seconds since anything in the folder was written."""
    # The folder's own time counts, too: it changes when a file in it is made.
    newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    return max(time.time() - newest, 0.0)
