"""The port at which ranks meet: a free one for ranks of one node, or one that follows from the job's name.

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
BETWEEN_STEPS = 4001
"""Distance between the ports of two steps of a job: prime to `NUM_PORTS`, so that 15,000 steps in a row differ."""


def free_port() -> int:
    """Draw a port among those that no program uses now on this node; it stays free until somebody binds it.

    Raises:
        EnvironmentProblem: a hundred in a row are taken.
    """
    for _ in range(TRIES):
        # `secrets` and not `random`: a seeded process would draw the same port as its twin.
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS)
        with socket.socket() as probe:
            try:
                # Without SO_REUSEADDR, so that a port whose last connections still drain counts as taken.
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise EnvironmentProblem(
        f"{TRIES} ports drawn from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are all taken on this node",
        "a free one, where the ranks of a run meet",
        "see what listens there, or set MASTER_PORT",
    )


def job_port(job: str, step: str = "") -> int:
    """Return a port that is equal on every rank of a step of a job, and most often different for two steps or jobs.

    Jobs and steps are numbered in a row: neighbours of either kind get different ports. Step 0 of job 1234 has port
    16234, step 1 20235, and step 0 of job 1235 has port 16235.
    """
    return FIRST_PORT + (_number(job) + BETWEEN_STEPS * _number(step or "0")) % NUM_PORTS


def _number(name: str) -> int:
    # crc32 and not `hash`, which differs from process to process.
    return int(name) if name.isdecimal() else zlib.crc32(name.encode())
