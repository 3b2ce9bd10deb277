#!/bin/bash
# Started by srun, once per rank; the arguments are the command of the rank.
export CACHE="/tmp/$USER-$SLURM_NODEID"
exec apptainer exec --nv --bind /scratch:/scratch --cleanenv /images/torch.sif "$@"
