"""`python -m tests.slurm.with_mpi train RUN.yaml`: the command `palimpsest` in a process that has called MPI_Init."""

import sys

from mpi4py import MPI

from engine import cli

if __name__ == "__main__":
    print(f"MPI rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size}", flush=True)
    sys.exit(cli.main(sys.argv[1:]))
