"""The port between a supervisor and the ranks of an attempt, and the ranks of this node behind it.

Launchers lose signals, so signals go to the ranks and never to a launcher. Invariant: when `end`
returns, no process of the attempt is alive on this node.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engine import heartbeat, outcome
from engine.outcome import Outcome
from engine.run_folder import RunFolder
from launcher import diagnosis, kernel, processes
from launcher.children import Child
from launcher.commands import Command
from launcher.decisions import View
from launcher.diagnosis import Seen
from launcher.verdict import End


class Ranks(Protocol):
    """Ranks of one attempt, wherever they run."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the world."""
        ...

    def start(self) -> None:
        """Start all of them. Raises `EnvironmentProblem`."""
        ...

    def view(self) -> View:
        """Return the state of their processes now."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that lives."""
        ...

    def take_stacks(self, view: View, silent_seconds: dict[int, float]) -> list[Seen]:
        """Return every live rank with its stack; takes a few seconds at most."""
        ...

    def end(self) -> tuple[tuple[End, ...], Outcome | None]:
        """Kill what still runs; return all ends, and an outcome that a rank could not write to the run folder."""
        ...


@dataclass
class LocalRanks:
    """Ranks on this node, started by `commands`: one per rank, or one launcher that starts them."""

    commands: list[Command]
    owned: RunFolder
    """The run folder, taken for the attempt; its job marks the processes (it is in the commands' environment)."""
    num_ranks: int
    _children: list[Child] = field(default_factory=list)
    _killed_before: int = field(default_factory=kernel.num_killed_for_memory)
    _beats: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="palimpsest-", dir=_memory())))

    def __post_init__(self) -> None:
        self._watch = processes.watch_job(self.owned.start.job)

    def start(self) -> None:
        """Start the commands; the first one's output is shown."""
        log_folder = self.owned.path / "logs"
        for command in self.commands:
            shown = command is self.commands[0]
            # Added one by one: where a later command cannot be started, `end` ends those before it.
            self._children.append(Child(command, {heartbeat.VARIABLE: str(self._beats)}, log_folder, shown))

    def view(self) -> View:
        """Return the state of the processes of this node."""
        start = self.owned.start
        # The outcome first: a rank that wrote it is seen as it was afterwards.
        said = (outcome.read(folder) for folder in (self.owned.path, self._beats))
        own = next((one for one in said if one is not None and one.is_of(start.job, start.attempt)), None)
        codes = [(child, child.popen.poll()) for child in self._children]
        ends = tuple(End(child.name, code) for child, code in codes if code is not None)
        marked = self._watch.look()
        return View(
            ends=ends,
            all_ended=len(ends) == len(self._children),
            # Also for ranks that have outlived their launcher.
            alive=len(ends) < len(self._children) or bool(marked),
            ranks=frozenset(rank.global_rank or 0 for rank in processes.ranks(marked)),
            beats={rank: heartbeat.read(self._beats, rank) for rank in range(self.num_ranks)},
            said=own,
            killed_for_memory=kernel.num_killed_for_memory() - self._killed_before,
        )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        processes.send(processes.ranks(processes.marked(self.owned.start.job)), number)

    def take_stacks(self, view: View, silent_seconds: dict[int, float]) -> list[Seen]:
        """Return every live rank with its stack."""
        ranks = processes.ranks(processes.marked(self.owned.start.job))
        return diagnosis.look_at(ranks, view.beats, silent_seconds)

    def end(self) -> tuple[tuple[End, ...], Outcome | None]:
        """Kill what still runs, and read what is left of it."""
        # By their mark and not by parentage: ranks that have outlived their launcher are ended, too.
        processes.send(processes.marked(self.owned.start.job), signal.SIGKILL)
        ends = tuple(child.end() for child in self._children)
        # The outcome that a rank could not write to the run folder (a full disk) is read before its folder goes.
        aside = outcome.read(self._beats)
        shutil.rmtree(self._beats, ignore_errors=True)
        return ends, aside


def _memory() -> str | None:
    """Return a folder in memory, where there is one: heartbeats are for as long as the node is up."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
