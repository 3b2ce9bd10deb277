"""Checkpoints in the memory of nodes: kept, passed on to the next node, and recalled."""
