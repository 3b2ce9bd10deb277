"""Runs on several nodes of a Slurm cluster: site profiles, the batch script, the conductor and the agents."""
