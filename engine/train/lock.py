"""One start of a run at a time in a run folder: a lock that the system takes back when its holder dies.

Rank 0 holds it (a POSIX record lock, which file systems shared between nodes know, too); `running.json` says to others
who it is, and stays behind empty: a file that is removed could be locked by one and made anew by another. A newer
attempt of the same job is let in: the one before may hang on a node that nobody reaches, and cannot commit
(`engine.checkpoint.folder.Owner`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from engine.config.place import RankPlace
from engine.errors import EnvironmentProblem
from engine.logs import logger

FILE = "running.json"
_HELD = (errno.EACCES, errno.EAGAIN)

_log = logger(__name__)


class FolderLock:
    """Held from `take` to `release`, or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: Any = None

    def take(self, place: RankPlace) -> None:
        """Call on one rank.

        Raises:
            EnvironmentProblem: another start of a run uses the folder.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = _parse(file.read())
            file.close()
            if error.errno not in _HELD:
                _log.warning("%s cannot be locked (%s): nothing keeps a second run out", self._path, error.strerror)
            elif holder.get("job") != place.job or holder.get("attempt", 0) >= place.attempt:
                raise self._in_use(holder) from error
            return
        file.truncate(0)
        file.write(
            json.dumps({"job": place.job, "attempt": place.attempt, "host": socket.gethostname(), "pid": os.getpid()})
        )
        file.flush()
        self._file = file

    def release(self) -> None:
        """Lets others in; safe to call twice."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _in_use(self, holder: dict[str, Any]) -> EnvironmentProblem:
        who = f"process {holder.get('pid')} on {holder.get('host')}, job {holder.get('job')}"
        return EnvironmentProblem(
            f"run folder {self._path.parent} is in use: {who if holder else 'a run that has just begun'}",
            "one start at a time in a run folder",
            f"wait for its end, or let it save and stop: kill {holder.get('pid', 'PID')} on that host",
        )


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
