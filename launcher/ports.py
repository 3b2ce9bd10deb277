"""The port where ranks meet: a free one for ranks of one node, or one that follows from the job's name.

Ranks that were started apart cannot agree on a free port, so theirs is a function of the job. All lie below the range
that Linux hands out to clients (32768 and up), where another program may take any port at any time, also one that was
free when it was looked for.
"""

from __future__ import annotations

import secrets
import socket
import zlib

from engine.errors import EnvironmentProblem

FIRST_PORT, NUM_PORTS = 15000, 15000
TRIES = 100


def free_port() -> int:
    """A port drawn among those that nobody uses now on this node; taken only when somebody binds it.

    Raises:
        EnvironmentProblem: a hundred in a row are taken.
    """
    for _ in range(TRIES):
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise EnvironmentProblem(
        f"{TRIES} ports drawn from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are all taken on this node",
        "a free one, where the ranks of a run meet",
        "see what listens there, or set MASTER_PORT",
    )


def job_port(job: str) -> int:
    """A port that is the same on every rank of a job, and most often different for two jobs."""
    number = int(job) if job.isdigit() else zlib.crc32(job.encode())
    return FIRST_PORT + number % NUM_PORTS
