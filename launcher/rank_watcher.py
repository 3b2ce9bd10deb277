"""Watcher of one rank that has no supervisor: a rank under a bare srun, mpirun, torchrun or deepspeed.

Each rank starts a small process of its own (`python -m launcher.rank_watcher`, without torch), which reads the rank's
heartbeats and outlives it. It notices two things that the rank cannot say itself:

- The rank ends without having said so: it was killed, or it crashed. The outcome then names it, before its neighbours
  write that they lost one.
- The rank is silent for longer than its phase may take. Since all ranks wait for the one that hangs, all watchers
  notice at about the same time: each writes what its rank is doing to the run folder, all read the reports of the
  others and come to the same conclusion. The rank that hangs is killed; the others have some seconds to end by
  themselves.

A stopped process group (Ctrl-Z, `scontrol suspend`) stops its watchers, too, and is no hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from engine import heartbeat, logs, outcome
from engine.atomic import write_atomically
from engine.errors import EXIT_FAILURE
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from launcher import diagnosis, kernel
from launcher.diagnosis import Seen
from launcher.processes import Process
from launcher.watchdog import Limits, Watchdog

if TYPE_CHECKING:  # the watcher starts without pydantic
    from engine.config.rank_environment import RankEnvironment
    from engine.config.schema.run import LaunchConfig

LOOK_SECONDS = 0.2
SETTLE_SECONDS = 5.0
"""Seconds that a watcher waits for the reports of the other ranks, once its own is silent."""
GRACE_SECONDS = 5.0
"""Seconds that a rank has to end by itself once the one that it waits for was killed."""
HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that Slurm sends to every process of a step; they are meant for the ranks, so the watcher blocks them."""
_PR_SET_PTRACER = 0x59616D61

_log = logs.logger(__name__)


# ---- in the rank


@contextlib.contextmanager
def heartbeat_folder(environment: RankEnvironment, given: Path | None) -> Iterator[Path | None]:
    """Yield the folder for this rank's heartbeats: the supervisor's, else one of its own; None for a rank alone.

    The own one is removed at the end, whatever the end is, which tells the watcher that the rank has ended by itself.
    """
    if given is not None or environment.world_size == 1:
        yield given
        return
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        folder = Path(tempfile.mkdtemp(prefix="palimpsest-rank-", dir=memory))
    except OSError as error:
        _log.warning("no folder for heartbeats (%s): a rank that hangs is not noticed", error)
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_watcher(environment: RankEnvironment, limits: LaunchConfig, folder: RunFolder, beats: Path) -> None:
    """Start the watcher of this rank, whose heartbeats are in `beats` (its own, from `heartbeat_folder`)."""
    reports = reports_of(folder.path, folder.start)
    if environment.global_rank == 0:
        shutil.rmtree(reports, ignore_errors=True)  # of an earlier start with this number
    start = folder.start
    watched = {
        "rank": environment.global_rank,
        "world_size": environment.world_size,
        "pid": os.getpid(),
        "beats": str(beats),
        "folder": str(folder.path.absolute()),
        "start": [start.job, start.attempt, start.mark],
        "limits": limits.model_dump(include=set(_LIMITS)),
    }
    # Blocked here and inherited: not even the first instant of the watcher hears a signal that is meant for the rank.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        command = [sys.executable, "-m", "launcher.rank_watcher", json.dumps(watched)]
        watcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as error:
        _log.warning("no watcher can be started (%s): a rank that hangs is not noticed", error)
        return
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # Many kernels let only ancestors read a process's memory, and the watcher is a child.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, watcher.pid, 0, 0, 0)


_LIMITS = ("step_limit_seconds", "step_limit_factor", "start_limit_seconds", "save_limit_seconds")


def reports_of(run_folder: Path, start: Start) -> Path:
    """Return the folder in which watchers leave their reports of an attempt that hangs."""
    return diagnosis.stacks_file(run_folder, start).with_suffix("")


# ---- in the watcher


@dataclass
class _Watcher:
    rank: int
    world_size: int
    pid: int
    beats: Path
    folder: RunFolder
    watchdog: Watchdog

    @classmethod
    def of(cls, told: dict[str, Any]) -> _Watcher:
        folder = RunFolder(Path(told["folder"]), Start(*told["start"]))
        folder.met = True  # the rank holds it, or has looked
        watchdog = Watchdog(cast(Limits, SimpleNamespace(**told["limits"])))
        return cls(told["rank"], told["world_size"], told["pid"], Path(told["beats"]), folder, watchdog)

    @property
    def rank_lives(self) -> bool:
        return os.getppid() == self.pid

    def run(self) -> None:
        """Watch until the rank has ended."""
        looked = time.monotonic()
        while self.rank_lives:
            time.sleep(LOOK_SECONDS)
            before, looked = looked, time.monotonic()
            if self.watchdog.look({self.rank: heartbeat.read(self.beats, self.rank)}, looked - before) is not None:
                # Looked at again: the rank may have said that it ends while its last beat was read.
                if self.beats.is_dir():
                    self._hangs()
                return
        if self.beats.is_dir():
            self._died()

    def _died(self) -> None:
        """Tell of a rank that has ended without a word, and clear what it left."""
        beat = heartbeat.read(self.beats, self.rank)
        words = f"rank {self.rank} ended without a word {beat.where if beat else ''}".rstrip()
        words += f" on {socket.gethostname()}: it was killed, or it crashed"
        if killed := kernel.num_killed_for_memory() - _KILLED_BEFORE:
            words += f"; the kernel has killed for want of memory meanwhile ({killed} times on this node)"
        self._tell(words, beat.step if beat else 0, self.rank)
        shutil.rmtree(self.beats, ignore_errors=True)

    def _hangs(self) -> None:
        """Report what the rank does, conclude together with the other watchers, and end the rank."""
        seen = self._look()
        self._report(seen)
        reports = self._everyones(seen)
        missing = sorted(set(range(self.world_size)) - reports.keys())
        found = list(reports.values())
        culprit = diagnosis.suspect(found)
        waiting = all(one.state not in diagnosis.STOPPED and one.collective is not None for one in found)
        # Ranks that only wait are not to blame while others have not even a watcher that answers.
        blamed = missing if missing and waiting else [culprit.global_rank]
        words = diagnosis.in_words(found)
        if missing and waiting:
            words = (
                f"no sign of life of rank {', '.join(map(str, missing))}, nor of a watcher there: a node is frozen, "
                f"cut off or lost; rank {', '.join(map(str, sorted(reports)))} waits in {culprit.collective}"
            )
        if self.rank in (min(reports), culprit.global_rank):
            self._tell(words + self._stacks(found), seen.beat.step if seen.beat else 0, blamed[0])
        self._end_rank(at_once=self.rank in blamed)

    def _look(self) -> Seen:
        silent = {self.rank: self.watchdog.ranks[self.rank].silent_seconds}
        beats = {self.rank: heartbeat.read(self.beats, self.rank)}
        [seen] = diagnosis.look_at([Process(self.pid, 0, self.rank)], beats, silent)
        return seen

    def _report(self, seen: Seen) -> None:
        folder = reports_of(self.folder.path, self.folder.start)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"rank-{self.rank}.json", diagnosis.to_json(seen))
        except OSError as error:
            _log.warning("%s cannot be written: %s", folder, error.strerror)

    def _everyones(self, own: Seen) -> dict[int, Seen]:
        """Return the reports by rank, once all are there or none has come for a while."""
        folder, found = reports_of(self.folder.path, self.folder.start), {self.rank: own}
        deadline = time.monotonic() + SETTLE_SECONDS
        while len(found) < self.world_size and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            for path in folder.glob("rank-*.json"):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    one = diagnosis.from_json(path.read_text(encoding="utf-8"))
                    found.setdefault(one.global_rank, one)
        return found

    def _stacks(self, found: list[Seen]) -> str:
        path = diagnosis.stacks_file(self.folder.path, self.folder.start)
        try:
            write_atomically(path, diagnosis.as_text(sorted(found, key=lambda one: one.global_rank)))
        except OSError:
            return ""
        return f"; all stacks: {path}"

    def _tell(self, words: str, step: int, rank: int) -> None:
        """Say it, and write the outcome where no rank of this start was first."""
        _log.error("%s", words)
        start = self.folder.start
        if outcome.read(self.folder.path) is None:  # the start has removed that of an earlier one
            self.folder.note(Outcome(start.job, start.attempt, EXIT_FAILURE, step, rank, words))

    def _end_rank(self, at_once: bool) -> None:
        deadline = time.monotonic() + (0 if at_once else GRACE_SECONDS)
        while self.rank_lives and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        if self.rank_lives:
            os.kill(self.pid, signal.SIGKILL)
        shutil.rmtree(self.beats, ignore_errors=True)


_KILLED_BEFORE = kernel.num_killed_for_memory()


def main() -> None:
    """Watch the rank that the only argument, a JSON object of `start_watcher`, describes."""
    told = json.loads(sys.argv[1])
    logs.configure(told["rank"], told["world_size"])
    _Watcher.of(told).run()


if __name__ == "__main__":
    main()
