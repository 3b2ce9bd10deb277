"""Command lines with which a batch script on two nodes starts ranks, one per launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.slurm.cluster import lacking

BIN = Path(sys.executable).parent
MPIRUN = "mpirun --allow-run-as-root --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
TORCHRUN = (
    f"{BIN}/torchrun --nnodes=$SLURM_JOB_NUM_NODES --nproc-per-node=PER_NODE --rdzv-backend=c10d "
    "--rdzv-endpoint=$(scontrol show hostnames | head -1):29400 --rdzv-id=$SLURM_JOB_ID"
)
# pdsh takes few variables along: the others stand in a file of the current folder.
DEEPSPEED = (
    "printenv | grep -E '^(OMP_NUM_THREADS|DS_ACCELERATOR)=' > .deepspeed_env; "
    f"scontrol show hostnames | sed 's/$/ slots=PER_NODE/' > hostfile; {BIN}/deepspeed --hostfile=hostfile "
    "--no_ssh_check --master_addr=$(hostname)"
)
LINES = {
    "srun": "srun --ntasks-per-node=PER_NODE python -m",
    "pmix": "srun --ntasks-per-node=PER_NODE --mpi=pmix python -m",
    "mpirun": f"{MPIRUN} --map-by ppr:PER_NODE:node python -m",
    "torchrun": f"srun --ntasks-per-node=1 {TORCHRUN} -m",
    "deepspeed-pdsh": f"{DEEPSPEED} --launcher=pdsh --module",
    "deepspeed-openmpi": f"{DEEPSPEED} --launcher=openmpi --launcher_args='--allow-run-as-root' --module",
    "deepspeed-slurm": f"{DEEPSPEED} --launcher=slurm --launcher_args='--mpi=pmix'",
}
"""Launcher -> line of a batch script; a module of Python (a file for `FILES`) and its arguments follow. `srun` of
torchrun evaluates its arguments on the batch host, which is the first node of the job."""
FILES = ("deepspeed-slurm",)
"""Launchers that start files alone: deepspeed's `--module` does not reach Slurm's ranks."""
NEEDS = {
    "mpirun": ("mpirun",),
    "deepspeed-pdsh": ("pdsh", "sshd"),
    "deepspeed-openmpi": ("mpirun", "sshd"),
}


def line(launcher: str, module: str, *arguments: str | Path, per_node: int = 1) -> str:
    """Return the line of a batch script that starts `python -m MODULE ARGUMENTS` on `per_node` ranks of each node."""
    if launcher in FILES:
        assert module == "engine.cli"
        module = str(BIN / "palimpsest")
    return " ".join([LINES[launcher].replace("PER_NODE", str(per_node)), module, *map(str, arguments)])


def reason_to_skip(launcher: str) -> str:
    """Return the reason why a launcher cannot be tried here; empty where it can."""
    if launcher in ("pmix", "deepspeed-slurm") and not any(Path("/usr/lib").glob("*/libpmix.so")):
        return "there is no libpmix.so (apt-get install libpmix-dev)"
    return lacking(*NEEDS.get(launcher, ()))
