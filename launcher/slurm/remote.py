"""Ranks on the nodes of a job, behind the same port as those of one node: one rank step, and an agent beside it.

Slurm starts the ranks and does no more. Whether they live is what the agents say, and the agents end them: a step
whose node is lost does not end before Slurm has noticed, which may take minutes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine import logs, outcome
from engine.errors import EnvironmentProblem
from engine.heartbeat import Beat
from engine.outcome import Outcome
from engine.run_folder import RunFolder
from launcher import diagnosis
from launcher.decisions import View
from launcher.diagnosis import Seen
from launcher.slurm import wire
from launcher.slurm.agents import Agents, Node
from launcher.slurm.spec import AGENTS_LOG
from launcher.slurm.step import Step
from launcher.verdict import End, Lost

PREPARE_SECONDS = 60.0
"""Seconds that agents have to end what an earlier attempt has left."""
STACKS_SECONDS = 30.0
"""Seconds that agents have to take the stacks of their ranks."""
LAST_WORD_SECONDS = 3.0
"""Seconds that an agent has to tell how the ranks ended, once their step has."""


@dataclass
class Meeting:
    """Point at which the ranks of an attempt meet."""

    host: str
    port: int


@dataclass
class AgentRanks:
    """Ranks of one attempt, `per_node` on each of these nodes, in their order."""

    nodes: list[Node]
    per_node: int
    owned: RunFolder
    """The run folder, taken for the attempt."""
    agents: Agents
    command: Callable[[Meeting], tuple[list[str], dict[str, str]]]
    """Returns the srun of the ranks and its whole environment."""
    meeting_host: str
    _step: Step | None = None
    _step_ended_at: float | None = None
    _failure_seen_at: float | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks of the world."""
        return len(self.nodes) * self.per_node

    def start(self) -> None:
        """Have the nodes made ready, and start the step of the ranks.

        Raises:
            EnvironmentProblem: a node does not get ready, or srun cannot be started.
        """
        number = self.owned.start.attempt
        for position, node in enumerate(self.nodes):
            ranks = self._ranks_of(position)
            node.line.send({"do": "prepare", "attempt": number, "ranks": [ranks.start, ranks.stop]})
        with logs.phase("waiting for the nodes to get ready"):
            missing = self._await(lambda node: (node.ready or {}).get("attempt") == number, PREPARE_SECONDS)
        if missing and not any(node.lost for node in missing):
            raise EnvironmentProblem(
                f"node {missing[0].name} does not get ready for attempt {number}",
                f"an answer of its agent within {PREPARE_SECONDS:.0f} s",
                f"see {AGENTS_LOG} in the folder of the job",
            )
        port = (self.nodes[0].ready or {}).get("port", 0)
        command, environment = self.command(Meeting(self.meeting_host, port))
        try:
            self._step = Step(command, environment, self.owned.path / "logs" / "launcher.log")
        except OSError as error:
            raise EnvironmentProblem(f"srun cannot be started: {error.strerror}") from error

    def view(self) -> View:
        """Return the state of the ranks, as the agents have last told it."""
        assert self._step is not None
        now, live = time.monotonic(), {node.name for node in self.agents.live()}
        code = self._step.poll()
        if code is not None and self._step_ended_at is None:
            self._step_ended_at = now
        here = [node for node in self.nodes if node.name in live]
        statuses = [node.status for node in here if node.status.get("attempt") == self.owned.start.attempt]
        alive = frozenset(int(rank) for status in statuses for rank in status["alive"])
        ends = [End(f"rank-{rank}", code) for status in statuses for rank, code in _by_rank(status["ends"])]
        if alive or ends:
            self._step.mark_begun()
        # The step's own end last: a rank is the reason for it, where there is one.
        ended = (*sorted(ends, key=_rank_of), *([End("launcher", code)] if code is not None else []))
        told = code is not None and (
            all(node.status_at > (self._step_ended_at or now) for node in here)
            or now - (self._step_ended_at or now) > LAST_WORD_SECONDS
        )
        lost = self._lost(live)
        return View(
            ends=ended if code is None or told else ended[:-1],
            all_ended=bool(told),
            alive=not told or bool(alive),
            ranks=alive,
            beats=self._beats(statuses),
            said=self._said(statuses, here, now),
            killed_for_memory=sum(status["memory"] for status in statuses),
            lost=lost,
        )

    def send(self, number: signal.Signals) -> None:
        """Have the agents send a signal to their ranks."""
        self._tell_all({"do": "signal", "number": int(number)})

    def take_stacks(self, view: View, silent_seconds: dict[int, float]) -> list[Seen]:
        """Return every live rank with its stack, as the agents of their nodes find it."""
        for node in self.nodes:
            node.seen = None
        self._tell_all({"do": "look", "silent": silent_seconds})
        with logs.phase("taking the stacks of all ranks"):
            self._await(lambda node: node.seen is not None, STACKS_SECONDS)
        return [diagnosis.from_json(found) for node in self.nodes for found in node.seen or []]

    def end(self) -> tuple[tuple[End, ...], Outcome | None]:
        """Have the ranks killed by their agents, and end the step without waiting for Slurm."""
        if self._step is None:
            return (End("launcher", 1),), None
        before = time.monotonic()
        self._tell_all({"do": "kill"})
        self._await(lambda node: node.status_at > before and not node.status.get("alive"), wire.SILENT_SECONDS)
        code = self._step.kill()
        statuses = [node.status for node in self.nodes if node.status.get("attempt") == self.owned.start.attempt]
        ends = [End(f"rank-{rank}", found) for status in statuses for rank, found in _by_rank(status["ends"])]
        asides = [Outcome(**status["aside"]) for status in statuses if status["aside"]]
        return (*sorted(ends, key=_rank_of), End("launcher", code)), asides[0] if asides else None

    def node_of(self, rank: int) -> Node:
        """Return the node that holds a rank."""
        return self.nodes[rank // self.per_node]

    def _ranks_of(self, position: int) -> range:
        return range(position * self.per_node, (position + 1) * self.per_node)

    def _tell_all(self, message: wire.Message) -> None:
        for node in self.nodes:
            if not node.lost:
                node.line.send(message)

    def _await(self, done: Callable[[Node], bool], seconds: float) -> list[Node]:
        """Return the nodes for which something has not come true within so many seconds; lost ones are not awaited."""
        deadline = time.monotonic() + seconds
        while True:
            live = {node.name for node in self.agents.live()}
            missing = [node for node in self.nodes if not done(node)]
            if not any(node.name in live for node in missing) or time.monotonic() >= deadline:
                return missing
            self.agents.wait_for_change(0.1)

    def _lost(self, live: set[str]) -> Lost | None:
        """Return the ranks of nodes that are lost."""
        gone = [position for position, node in enumerate(self.nodes) if node.name not in live]
        if not gone:
            return None
        ranks = [rank for position in gone for rank in self._ranks_of(position)]
        words = "; ".join(f"node {self.nodes[position].name} is lost: {self.nodes[position].lost}" for position in gone)
        number = self.owned.start.attempt
        # Of all nodes: ranks are within one step of each other, and the lost ones were last heard a moment before.
        statuses = [node.status for node in self.nodes if node.status.get("attempt") == number]
        steps = [beat["step"] for status in statuses for beat in status["beats"].values()]
        # A node is lost once: its name keeps two losses at the same step apart.
        cause = "lost " + ", ".join(self.nodes[position].name for position in gone)
        return Lost(frozenset(ranks), f"{words} (ranks {_ranges(ranks)})", max(steps, default=0), cause)

    def _beats(self, statuses: list[wire.Message]) -> dict[int, Beat | None]:
        beats: dict[int, Beat | None] = dict.fromkeys(range(self.num_ranks))
        for status in statuses:
            beats.update({int(rank): Beat(**beat) for rank, beat in status["beats"].items()})
        return beats

    def _said(self, statuses: list[wire.Message], here: list[Node], now: float) -> Outcome | None:
        """Return this attempt's outcome, once every node has reported since it came to light.

        The file is seen at once and the ranks half a second later: a rank that vanished before it was written would
        count as one that came after.
        """
        start = self.owned.start
        asides = [Outcome(**status["aside"]) for status in statuses if status["aside"]]
        candidates = [outcome.read(self.owned.path), *asides]
        own = next((one for one in candidates if one is not None and one.is_of(start.job, start.attempt)), None)
        if own is None:
            return None
        if self._failure_seen_at is None:
            self._failure_seen_at = now
        return own if all(node.status_at > self._failure_seen_at for node in here) else None


def _by_rank(found: dict[str, int]) -> list[tuple[int, int]]:
    return [(int(rank), code) for rank, code in found.items()]


def _rank_of(end: End) -> int:
    return end.global_rank or 0


def _ranges(numbers: list[int]) -> str:
    """Return numbers in words: `0 to 7` for a row, else all of them."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
