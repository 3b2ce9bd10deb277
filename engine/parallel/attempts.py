"""Agreement of torchrun's ranks on the number of their attempt: each agent counts only the restarts that it began.

Where a rank fails, the agent of its node counts a restart. The other agents see that somebody waits for them to meet
again, and restart their ranks without counting ("membership changes do not count as retries",
`torch.distributed.elastic.agent.server.api`, 2.13). Ranks of one world are then given different counts, and the one of
rank 0 may be that of an attempt which has saved already. Rank 0 therefore takes a number above all that were used, and
the others ask for it through the store of rank 0's agent. The store outlives the ranks, but not the agent's node.

Keys of the store: `next` (number after the newest attempt), `asked` (questions so far, of all attempts), `answer/N`
(attempt of the rank that asked question N), `heard/A` (ranks that know of attempt A, each once), `heard/A/R` (processes
of rank R that do). A process whose agent was killed may wait on beside its successor, and must not be taken for it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from engine.errors import EnvironmentProblem

if TYPE_CHECKING:
    from engine.parallel.meeting import Store

POLL_SECONDS = 0.05
"""Seconds between two looks into the store."""


def agree_on_attempt(store: Store, global_rank: int, world_size: int, least: int, limit_seconds: float) -> int:
    """Return the number of this attempt, `least` of rank 0 or more, equal on all ranks. Collective over the world.

    Raises:
        EnvironmentProblem: some ranks have not come after `limit_seconds`, on rank 0; on another one, its agent
            has ended.
    """
    if global_rank > 0:
        return _asked(store, global_rank)
    # `add` of 0 reads a counter, which is 0 where nobody has counted.
    unused = store.add("next", 0)
    attempt = max(least, unused)
    store.add("next", attempt + 1 - unused)
    deadline, answered = time.monotonic() + limit_seconds, 0
    # Questions of ranks that have ended since are answered, too: nobody reads those answers, or counts as having heard.
    while store.add(f"heard/{attempt}", 0) < world_size - 1:
        asked = store.add("asked", 0)
        for question in range(answered + 1, asked + 1):
            store.set(f"answer/{question}", str(attempt))
        answered = asked
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"{store.add(f'heard/{attempt}', 0) + 1} of {world_size} ranks have come after {limit_seconds:.0f} s",
                "all ranks that torchrun has started",
                "look at what the ranks of the other nodes said, and whether they reach MASTER_ADDR and MASTER_PORT",
            )
        time.sleep(POLL_SECONDS)
    return attempt


def _asked(store: Store, global_rank: int) -> int:
    """Return the attempt that rank 0 answers with, and count as having heard it."""
    agent = os.getppid()
    question = store.add("asked", 1)
    attempt = int(store.get(f"answer/{question}"))
    if os.getppid() != agent:  # a process whose parent is gone is given another one
        raise EnvironmentProblem(
            f"torchrun's agent of rank {global_rank} has ended while the rank waited for the others",
            "an agent that lives as long as its ranks",
            "nothing: the agent that was started in its place has a rank of its own",
        )
    if store.add(f"heard/{attempt}/{global_rank}", 1) == 1:
        store.add(f"heard/{attempt}", 1)
    return attempt
