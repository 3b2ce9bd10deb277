"""Cores of one rank among the ranks of its node, and the number of threads that follows.

Without a limit every rank starts a thread per core of its node, and threads of different ranks then wait for each other
in busy loops: two ranks on two cores train about fifty times slower. `palimpsest launch` and torchrun set
OMP_NUM_THREADS; under a bare srun or mpirun nobody does, so each rank does it for itself. What the user or the launcher
has set stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping

from engine.config.rank_environment import RankEnvironment

THREADS = "OMP_NUM_THREADS"
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables with which a user binds threads to cores."""


def share_cores(environment: RankEnvironment, environ: MutableMapping[str, str], on_gpu: bool) -> None:
    """Set this process's number of threads, and bind a rank on the CPU to its share of the cores.

    Call before torch is imported, from the main thread; threads that start later inherit the cores. A rank with a GPU
    is not bound: its cores should be near the GPU, which only the launcher knows.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = cores_of_rank(environment, environ, cores, os.cpu_count() or len(cores))
    environ.setdefault(THREADS, str(num_threads(environment, environ, own)))
    if not on_gpu and own != cores and not any(name in environ for name in BINDING):
        os.sched_setaffinity(0, own)


def cores_of_rank(
    environment: RankEnvironment, environ: Mapping[str, str], cores: list[int], num_node_cores: int
) -> list[int]:
    """Return the cores for a rank that may use `cores` of a node with `num_node_cores`.

    They are all of `cores` where its launcher has bound the rank; else the ranks of the node share them, in blocks of
    equal size.
    """
    sharing = environment.local_world_size
    if environment.launcher == "slurm" and _bound_by_slurm(environ):
        sharing = 1
    elif environment.launcher in ("openmpi", "pmi") and len(cores) < num_node_cores:
        # mpirun binds to a core, or to a socket that several ranks share: 16 ranks on 2 sockets are 8 on each.
        sharing = math.ceil(sharing * len(cores) / num_node_cores)
    size = max(len(cores) // sharing, 1)
    first = environment.local_rank % sharing * size % len(cores)  # more ranks than cores: some have the same one
    return cores[first : first + size]


def num_threads(environment: RankEnvironment, environ: Mapping[str, str], cores: list[int]) -> int:
    """Return the number of threads of a rank whose cores are `cores`."""
    wanted = environ.get("SLURM_CPUS_PER_TASK", "")
    # The cores of a job that Slurm does not confine are all of the node's, also those of its other jobs.
    limit = int(wanted) if environment.launcher == "slurm" and wanted.isdecimal() else len(cores)
    return max(min(limit, len(cores)), 1)


def _bound_by_slurm(environ: Mapping[str, str]) -> bool:
    """Return True if Slurm has given each task of the step cores of its own (`--cpu-bind`)."""
    return environ.get("SLURM_CPU_BIND_TYPE", "").startswith(("mask", "map", "rank"))
