#!/bin/bash
# Started by srun, once per rank; the arguments are the command of the rank.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
export PALIMPSEST_MARK="$PALIMPSEST_JOB.$PALIMPSEST_ATTEMPT"
# Signals are the rank's: this shell outlives it and keeps its exit code.
trap : TERM INT HUP USR1 USR2
"$@" &
rank=$!
# A signal interrupts `wait`, so it is called until the rank is gone.
while kill -0 "$rank" 2>/dev/null; do wait "$rank"; done
wait "$rank"
code=$?
# An agent that has ended the rank may have cleared the folder.
{ echo "$code" > "$PALIMPSEST_HEARTBEATS/end-$RANK"; } 2>/dev/null
exit "$code"
