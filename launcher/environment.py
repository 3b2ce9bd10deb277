"""Environment of this process as a rank: what `palimpsest launch` or another launcher says in variables, as one value.

Invariant: a `RankEnvironment` is complete or there is none. `os.environ` is read by the caller;
`launcher.rank_readers` knows the launchers.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from engine import heartbeat
from engine.config.rank_environment import RankEnvironment
from engine.errors import EnvironmentProblem
from engine.run_folder import RunFolder, Start
from launcher.ports import free_port, job_port
from launcher.rank_readers import find_rank
from launcher.variables import ATTEMPT, JOB, LAUNCHER, OVERRIDES, Environ, first_number, number

RESTARTS_PER_START = 1000
"""Attempt numbers reserved for each start by Slurm: restarts by torchrun inside of it count on from there."""
LOOPBACK = "127.0.0.1"


def rank_environment(environ: Environ) -> RankEnvironment:
    """Return the rank environment of this process, from the variables of its launcher; alone where there are none.

    A process alone is given a free port, so that two runs on one node do not meet.

    Raises:
        EnvironmentProblem: variables are missing, unreadable or contradict each other.
    """
    found = find_rank(environ)
    job = environ.get(JOB) or found.job
    several = found.num_nodes > 1
    # The user's own variable wins: only they know which of a node's networks the others reach.
    address = environ.get("MASTER_ADDR") or found.master_addr or ("" if several else LOOPBACK)
    if not address:
        raise EnvironmentProblem(
            f"MASTER_ADDR is not set and the {found.num_nodes} nodes of {found.launcher} do not say who holds rank 0",
            "the host name of rank 0's node",
            "set MASTER_ADDR on every rank, for example mpirun -x MASTER_ADDR=HOST",
        )
    # Ranks cannot agree on a free port before they have met, so theirs follows from the names that they share.
    port = number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else found.master_port
    # A supervised job has a name that no other start has, so its ranks need no step to be told apart.
    step = "" if is_supervised(environ) else found.step
    return RankEnvironment(
        global_rank=found.global_rank,
        world_size=found.world_size,
        local_rank=found.local_rank,
        master_addr=address,
        master_port=port or (free_port() if found.world_size == 1 else job_port(job, step)),
        job=job,
        attempt=_attempt(environ),
        local_world_size=found.local_world_size,
        node_rank=found.node_rank,
        num_nodes=found.num_nodes,
        launcher=environ.get(LAUNCHER) or found.launcher,
        step=step,
    )


def hidden_overrides(environ: Environ) -> list[str]:
    """Return the overrides that `palimpsest launch` keeps out of the command line; most often none."""
    return json.loads(environ.get(OVERRIDES) or "[]")


def is_supervised(environ: Environ) -> bool:
    """Return True if `palimpsest launch` watches over this process."""
    return bool(environ.get(LAUNCHER))


def shares_store_of_agents(environ: Environ) -> bool:
    """Return True under a torchrun whose agents meet by themselves (c10d), and whose restarts nobody else counts."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not is_supervised(environ)


def run_folder(path: Path, environment: RankEnvironment, environ: Environ) -> RunFolder:
    """Return the run folder as this rank sees it; not taken yet."""
    meeting = f"{environment.master_addr}:{environment.master_port}"
    mark = "" if is_supervised(environ) else f"step {environment.step or 'none'}, {meeting}"
    # both start the ranks of a node from one process
    one_parent = mark and environment.launcher in ("torchrun", "deepspeed")
    beats = Path(environ.get(heartbeat.VARIABLE) or "/nowhere")
    return RunFolder(
        path,
        Start(environment.job, environment.attempt, mark),
        parent=os.getppid() if one_parent else None,
        aside=beats if is_supervised(environ) and beats.is_dir() else None,
    )


def export(environment: RankEnvironment, environ: MutableMapping[str, str]) -> None:
    """Write the variables that torch and DeepSpeed read, whichever launcher started the ranks."""
    environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.local_world_size),
        MASTER_ADDR=environment.master_addr,
        MASTER_PORT=str(environment.master_port),
    )


def _attempt(environ: Environ) -> int:
    if environ.get(ATTEMPT):
        return number(environ, ATTEMPT)
    restarts = first_number(environ, ("SLURM_RESTART_COUNT",), 0)
    # A number that only grows, so that no earlier attempt can commit over this one: restart 2 of start 1 is 1002.
    return restarts * RESTARTS_PER_START + first_number(environ, ("TORCHELASTIC_RESTART_COUNT",), 0)
