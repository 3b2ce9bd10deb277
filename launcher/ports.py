"""The port where ranks meet: a free one for ranks of one node, or one that follows from the job's name.

Ranks that were started apart cannot agree on a free port, so theirs is a function of the job. Derived ports lie
below the range that Linux hands out to clients (32768 and up), where another program may sit on any port.
"""

from __future__ import annotations

import socket
import zlib

FIRST_PORT, NUM_PORTS = 15000, 15000


def free_port() -> int:
    """A port that nobody listens on now on this node; taken only when somebody binds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job_port(job: str) -> int:
    """A port that is the same on every rank of a job, and most often different for two jobs."""
    number = int(job) if job.isdigit() else zlib.crc32(job.encode())
    return FIRST_PORT + number % NUM_PORTS
