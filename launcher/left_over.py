"""Variables of other launchers about ranks and nodes, which ranks of `palimpsest launch` must not see.

`launch` starts every rank of one node itself: the nodes and ranks of a pod's operator, an outer torchrun or an mpirun
are about another world. Variables that say nothing of a rank (SLURM_JOB_ID, NCCL_*) stay.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "JOB_COMPLETION_INDEX",
)
PREFIXES = ("TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL", "PALIMPSEST_")
"""PET_* are torchrun's options as variables, which win over its own defaults."""


def left_over(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of such variables in an environment, sorted."""
    return tuple(sorted(name for name in environ if name in NAMES or name.startswith(PREFIXES)))
