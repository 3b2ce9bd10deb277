"""The owner of a run folder: one start of a run at a time, which alone writes there.

The owner holds POSIX record locks on `running.json`, which the system releases when their holder dies and which file
systems shared between nodes know. The file says who the owner is, and stays behind empty: a file that is removed could
be locked by one process and made anew by another. A newer attempt of the same job is let in: the one before may hang on
a node that nobody reaches, and cannot commit (`engine.checkpoint.folder.Owner`).

Byte 0 of the file is `palimpsest launch`'s, byte 1 + attempt rank 0's of that attempt, so that a launch and its ranks
hold the folder together and the survivors of either keep others out. Closing any handle of the file in a process drops
that process's locks: an owner reads the file through the handle that holds them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from engine import outcome
from engine.errors import EnvironmentProblem
from engine.logs import logger
from engine.outcome import Outcome

FILE = "running.json"
_HELD = (errno.EACCES, errno.EAGAIN)
_FLOCK = struct.Struct("@hhqqi4x")
"""Linux's `struct flock` on 64 bits: type, whence, start, length, process."""

_log = logger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a run, as each of its ranks knows it."""

    job: str
    attempt: int
    mark: str = ""
    """Step and meeting point of the ranks, which tell this start from another of the same job and attempt. Empty under
    `palimpsest launch`, whose jobs have unique names."""

    @property
    def file_name(self) -> str:
        """Beginning of the names of files about this start, `JOB.ATTEMPT`: those of another job are not replaced."""
        return outcome.file_name(self.job, self.attempt)


@dataclass(frozen=True)
class FolderUser:
    """Start that uses a run folder now, as `running.json` names it; with an empty job where it has just begun."""

    job: str = ""
    attempt: int = 0
    host: str = ""
    pid: int = 0
    confirmed: bool = True
    """False where the file system does not tell whether the name's process still holds the folder."""


def current_user(path: Path) -> FolderUser | None:
    """Return the start that uses the run folder `path`, None where no process holds it.

    For a process that does not hold the folder itself: its locks would go with the handle that is closed here.
    """
    folder = RunFolder(path, Start("", 0))
    record, held = folder._read(), folder._is_held()
    if held is False or (held is None and not record):
        return None
    names = {key: record[key] for key in ("job", "attempt", "host", "pid") if key in record}
    return FolderUser(**names, confirmed=held is True)


class RunFolder:
    """A run folder, as one process of a start sees it. Rank 0, or the supervisor, takes it; see `is_ours`."""

    def __init__(self, path: Path, start: Start, parent: int | None = None, aside: Path | None = None) -> None:
        """Make the view of a folder; nothing is taken yet.

        `parent` is the parent process that all ranks of this start on one host share, where they do; `aside` a folder
        of the supervisor on this node, in memory, which takes an outcome that the run folder does not."""
        self.path, self.start, self._parent, self._aside = path, start, parent, aside
        self.met = False
        """True once this rank has met rank 0, which holds the folder, and agreed with it."""
        self._handle: int | None = None
        self._refused = self._supervises = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.release()

    @property
    def is_taken(self) -> bool:
        """True if this process has taken the folder."""
        return self._handle is not None

    def take(self, start: Start | None = None, supervisor: bool = False) -> None:
        """Make this start the folder's owner, or `start`, the next attempt of the one that is.

        Raises:
            EnvironmentProblem: another start of a run uses the folder, or it cannot be written to.
        """
        self.start, self._supervises = start or self.start, supervisor
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The next attempt keeps the handle: to close it, or any other of this file, would drop the locks.
            handle = os.open(self.path / FILE, os.O_RDWR | os.O_CREAT, 0o666) if self._handle is None else self._handle
        except OSError as error:
            raise self._unusable(error) from error
        if not self._lock(handle, 0 if supervisor else 1 + self.start.attempt):
            record = _parse(os.pread(handle, 1 << 16, 0))
            os.close(handle)
            self._handle = None
            raise self._in_use(record)
        self._handle = handle
        # Written after the lock: a record without a lock is a dead owner's, a lock without a record a new one's.
        who = {"host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}
        text = json.dumps(asdict(self.start) | who).encode()
        try:
            # Over the old record and then cut to length, so that no reader finds the file empty in between.
            os.pwrite(handle, text, 0)
            os.ftruncate(handle, len(text))
        except OSError as error:
            raise self._unusable(error) from error

    def clear(self) -> None:
        """Remove what an earlier start, or attempt, said of its end. Raises `EnvironmentProblem` where it stays."""
        try:
            outcome.clear(self.path)
        except OSError as error:
            raise self._unusable(error) from error

    def refuse_other(self) -> None:
        """Raise `EnvironmentProblem` while another start uses the folder; for the ranks that do not take it."""
        record = self._read()
        # No lock is asked for: only rank 0 takes the folder, and it may be about to.
        if record and not self._named(record) and not self._follows(record) and self._is_held():
            raise self._in_use(record)

    def is_ours(self) -> bool:
        """Return True if this start owns the folder, so that this process may write there.

        Who has taken it knows, as long as no newer attempt has taken it since. Another rank goes by the name in the
        folder; until it has met rank 0, a start of the same name on this host under another parent is not its own.
        """
        record = self._read()
        # A start that was refused never owns the folder. One that has taken it still does where the file cannot be
        # read: no record says that a newer attempt has come.
        if self._refused or (self.is_taken and not record):
            return self.is_taken
        if self.is_taken or self.met or self._parent is None or record.get("host") != socket.gethostname():
            return self._named(record)
        return self._named(record) and record.get("parent") == self._parent

    def note(self, found: Outcome) -> OSError | None:
        """Write how the run ended, if this start still owns the folder; call on one rank.

        What cannot be written is left to the supervisor, where there is one; the exit code says it, too. The reason is
        returned.
        """
        try:
            if self.is_ours():
                outcome.write(self.path, found)
        except OSError as error:
            _log.warning("the outcome of the run cannot be written to %s: %s", self.path, error)
            self._set_aside(found)
            return error
        return None

    def note_failure(self, found: Outcome) -> None:
        """Write the outcome of a failure, unless another rank of this start was first; call on any rank.

        A folder that nobody uses, or that is not there yet, is taken for it. What cannot be written is dropped.
        """
        try:
            before = not self.is_taken and self._is_held() is False  # what is there may be an earlier start's word
            if before:
                self.take()
            said = outcome.read(self.path)
            if self.is_ours() and (said is None or (before and not said.is_of(found.job, found.attempt))):
                outcome.write(self.path, found)
        except OSError as error:
            _log.warning("the failure of this rank cannot be written to %s: %s", self.path, error)
            self._set_aside(found)
        except EnvironmentProblem as error:
            _log.warning("the failure of this rank cannot be written to %s: %s", self.path, error)

    def wait_for_failure(self, seconds: float) -> None:
        """Wait until a rank of this start has written an outcome, for `seconds` at most.

        Under `palimpsest launch`, which knows by itself which rank it has lost, there is no wait."""
        deadline = time.monotonic() + (seconds if self.start.mark else 0.0)
        while outcome.read(self.path) is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _set_aside(self, found: Outcome) -> None:
        """Leave an outcome to the supervisor; the first rank to do so is the one that is read."""
        if self._aside is not None and outcome.read(self._aside) is None:
            with contextlib.suppress(OSError):
                outcome.write(self._aside, found)

    def release(self) -> None:
        """Let others in; safe to call twice. A supervised rank leaves the name to its supervisor."""
        if self._handle is not None:
            # Emptied and not removed: another process may have the file open, and would lock one that nobody else sees.
            if (self.start.mark or self._supervises) and self._named(self._read()):
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def _lock(self, handle: int, own: int) -> bool:
        """Lock one byte; the whole file must be free for that, unless its owner lets this start in."""
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                record = _parse(os.pread(handle, 1 << 16, 0))
                if error.errno not in _HELD or not (self._follows(record) or self._is_supervised_by(record)):
                    raise
                # The owner, this start's supervisor or an older attempt, keeps its byte; this process locks its own.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, own)
                return True
            # The whole file was free: give back the bytes before the own one, then those behind it (length 0: all).
            if own:
                fcntl.lockf(handle, fcntl.LOCK_UN, own, 0)
            fcntl.lockf(handle, fcntl.LOCK_UN, 0, own + 1)
        except OSError as error:
            if error.errno in _HELD:
                return False
            _log.warning("%s cannot be locked (%s): nothing keeps a second run out", self.path / FILE, error.strerror)
        return True

    def _is_held(self) -> bool | None:
        """Return True if another process has locked the folder; None where that cannot be found out."""
        try:
            with (self.path / FILE).open("rb") as file:
                # F_GETLK answers with a lock that stands in this one's way, or with F_UNLCK. Python has no wrapper.
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                return _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
        except FileNotFoundError:
            return False
        except OSError:
            return None

    def _named(self, record: dict[str, Any]) -> bool:
        return asdict(self.start) == {key: record.get(key) for key in asdict(self.start)}

    def _follows(self, record: dict[str, Any]) -> bool:
        """Return True if this start is a newer attempt of the same job."""
        return record.get("job") == self.start.job and record.get("attempt", 0) < self.start.attempt

    def _is_supervised_by(self, record: dict[str, Any]) -> bool:
        return not self.start.mark and self._named(record)

    def _read(self) -> dict[str, Any]:
        """Return the record of the owner; empty where nobody does, or nobody can tell."""
        try:
            if self._handle is not None:
                return _parse(os.pread(self._handle, 1 << 16, 0))
            return _parse((self.path / FILE).read_bytes())
        except OSError:
            return {}

    def _unusable(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"run folder {self.path} cannot be used: {error.strerror}",
            "a folder that can be written",
            "change `folder`",
        )

    def _in_use(self, record: dict[str, Any]) -> EnvironmentProblem:
        self._refused = True
        who = f"process {record.get('pid')} on {record.get('host')}, job {record.get('job')}"
        return EnvironmentProblem(
            f"run folder {self.path} is in use: {who if record else 'a run that has just begun'}",
            "one start at a time in a run folder",
            f"wait for its end, or let it save and stop: kill {record.get('pid', 'PID')} on that host",
        )


def _parse(text: bytes) -> dict[str, Any]:
    """Return the record in a file's bytes; empty where there is none, or it is cut off."""
    try:
        # The first JSON value alone: a record that is being written may have the end of a longer one behind it.
        found, _ = json.JSONDecoder().raw_decode(text.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("attempt"), int) else {}
