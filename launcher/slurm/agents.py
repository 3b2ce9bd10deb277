"""The agents of a job, as its conductor knows them: connections, and what each node has last said."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine import logs
from launcher.slurm import wire

_log = logs.logger(__name__)


@dataclass
class Node:
    """One node of the job with its agent. Written by the thread that reads its connection, read by the conductor."""

    name: str
    number: int
    """Place of the node in Slurm's order, in which ranks are numbered, too."""
    address: str
    """IP address of the site's interface; empty where it names none."""
    line: wire.Line
    status: wire.Message = field(default_factory=dict)
    status_at: float = 0.0
    """Time on the monotonic clock at which `status` came."""
    heard_at: float = field(default_factory=time.monotonic)
    ready: wire.Message | None = None
    seen: list[str] | None = None
    checked: wire.Message | None = None
    checked_at: float = 0.0
    """Time on the monotonic clock at which `checked` came."""
    lost: str = ""
    """Reason for which the node is lost; empty while it is there."""


class Agents:
    """Server for the agents of one job; use as a context manager."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._server = socket.create_server(("", 0), backlog=1024)
        self._nodes: dict[str, Node] = {}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def port(self) -> int:
        """Port at which agents are awaited."""
        return self._server.getsockname()[1]

    def __enter__(self) -> Agents:
        for run in (self._accept, self._ping):
            threading.Thread(target=run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for node in self.all():
            # Told to every node: one that wakes up later finds it, and leaves the job alone.
            node.line.send({"do": "bye"})
        # shutdown: a server that another thread waits at would stay open until somebody connects.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def all(self) -> list[Node]:
        """Return every node that has ever had an agent, in Slurm's order."""
        with self._changed:
            return sorted(self._nodes.values(), key=lambda node: node.number)

    @property
    def num_lost(self) -> int:
        """Number of nodes that are lost."""
        return sum(bool(node.lost) for node in self.all())

    def live(self) -> list[Node]:
        """Return the nodes that are there, in Slurm's order; notice those that have fallen silent."""
        now = time.monotonic()
        for node in self.all():
            if not node.lost and now - node.heard_at > wire.SILENT_SECONDS:
                self._lose(node, f"no sign of life for {wire.SILENT_SECONDS:.0f} s")
        return [node for node in self.all() if not node.lost]

    def wait(self, num_nodes: int, seconds: float, give_up: Callable[[], bool]) -> list[Node]:
        """Return the live nodes once there are so many, after so many seconds, or where `give_up` returns True."""
        deadline = time.monotonic() + seconds
        while len(live := self.live()) < num_nodes and time.monotonic() < deadline and not give_up():
            with self._changed:
                self._changed.wait(wire.BEAT_SECONDS)
        return live

    def wait_for_change(self, seconds: float) -> None:
        """Return when something has arrived, or after so many seconds."""
        with self._changed:
            self._changed.wait(seconds)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(wire.Line(connection),), daemon=True).start()

    def _serve(self, line: wire.Line) -> None:
        """Read one connection until it ends."""
        node: Node | None = None
        for message in line.messages():
            if message is None:
                if node is None:
                    break  # a stranger that says nothing
                continue
            if node is None:
                node = self._welcome(message, line)
                if node is None:
                    break
                continue
            self._note(node, message)
        line.close()
        if node is not None and not node.lost and not self._closed:
            self._lose(node, "its agent's connection has ended")

    def _welcome(self, message: wire.Message, line: wire.Line) -> Node | None:
        """Return the node behind a first message; None where it has no token of this job, or is a lost one."""
        if not wire.is_token(message.get("token"), self.token):
            return None
        node = Node(str(message["node"]), int(message["number"]), str(message.get("address", "")), line)
        with self._changed:
            known = self._nodes.get(node.name)
            if known is not None:
                # It was cut off, or frozen, and its ranks were taken for lost: Slurm may end its step at any time.
                line.send({"do": "bye"})
                return None
            self._nodes[node.name] = node
            self._changed.notify_all()
        return node

    def _note(self, node: Node, message: wire.Message) -> None:
        with self._changed:
            node.heard_at = time.monotonic()
            said = message.get("say")
            if said == "status":
                node.status, node.status_at = message, node.heard_at
            elif said == "ready":
                node.ready = message
            elif said == "seen":
                node.seen = message["seen"]
            elif said == "checked":
                node.checked, node.checked_at = message, node.heard_at
            self._changed.notify_all()

    def _lose(self, node: Node, why: str) -> None:
        with self._changed:
            node.lost = why
            self._changed.notify_all()
        _log.warning("node %s is lost: %s", node.name, why)
        node.line.send({"do": "bye"})

    def _ping(self) -> None:
        while not self._closed:
            for node in self.all():
                if not node.lost:
                    node.line.send({"do": "ping"})
            time.sleep(wire.BEAT_SECONDS)
