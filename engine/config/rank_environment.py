"""The environment of one rank: a value, found by `launcher.environment`, handed to `engine.train`.

It says nothing about axes (`engine.parallel.axes` does): only which rank this is, on which node, where the ranks
meet, and which attempt of which job they belong to. Every rank of a world differs in `global_rank`, `local_rank`
and `node_rank` alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnvironment:
    """One rank among the ranks of a run."""

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Position among the ranks of this node: which of its devices this rank uses."""
    master_addr: str = "127.0.0.1"
    """Host of global rank 0, where the ranks meet."""
    master_port: int = 29500
    job: str = "local"
    """Name of the job (a cluster's job number, or the launcher's own), equal on every rank and in every attempt."""
    attempt: int = 0
    """Number of earlier starts of the job: an older attempt never commits over a newer one."""
    local_world_size: int = 1
    """Ranks on this node."""
    node_rank: int = 0
    num_nodes: int = 1
    launcher: str = "alone"
    """Launcher of the ranks: alone, local, torchrun, deepspeed, slurm, openmpi, pmi, kubernetes, or environment (set
    by hand)."""
    step: str = ""
    """The part of the job that these ranks are (a step of a Slurm job, one mpirun); empty where it has no parts."""
