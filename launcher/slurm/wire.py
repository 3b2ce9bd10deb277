"""Messages between conductor and agents: JSON objects, one per line, over a TCP connection.

The first line of an agent carries the token of the job, which only processes of this user see (in their environment);
a connection without it is closed. Lines are short, and a longer one is refused, so that a stranger cannot fill the
memory of the conductor.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

TOKEN = "PALIMPSEST_TOKEN"
"""Variable that holds the token of a job's agents."""
CONDUCTOR = "PALIMPSEST_CONDUCTOR"
"""Variable that holds `HOST:PORT` of the conductor."""
LONGEST_LINE = 1 << 22
"""Most bytes of a message; the stacks of 16 ranks take about 100 KiB."""
BEAT_SECONDS = 0.5
"""Seconds between two messages of an agent, and of the conductor to it."""
SILENT_SECONDS = 8.0
"""Seconds of silence after which either side takes the other for lost."""

Message = dict[str, Any]


class Line:
    """One connection, which may be written from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # A node that was cut off sends no end of the connection: a write must not wait for it.
        connection.settimeout(SILENT_SECONDS)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writing = threading.Lock()

    def send(self, message: Message) -> bool:
        """Send a message; return False where the other side is gone."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._writing:
                self._connection.sendall(data)
        except OSError:
            return False
        return True

    def messages(self) -> Iterator[Message | None]:
        """Yield what arrives, and None when nothing has arrived for a while, until the other side is gone."""
        kept = bytearray()
        while True:
            try:
                chunk = self._connection.recv(1 << 16)
            except TimeoutError:
                yield None
                continue
            except OSError:
                return
            if not chunk:
                return
            kept += chunk
            *lines, rest = kept.split(b"\n")
            kept = bytearray(rest)
            if len(kept) > LONGEST_LINE:
                return
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    return
                if not isinstance(message, dict):
                    return
                yield message

    def close(self) -> None:
        """Close the connection, also for a thread that waits for a message."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def is_token(found: object, token: str) -> bool:
    """Return True if a message's token is this job's, in a time that does not depend on it."""
    return isinstance(found, str) and hmac.compare_digest(found.encode(), token.encode())
