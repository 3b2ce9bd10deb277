"""Training: a rank's part of a run, its steps, and the state that a restart needs."""
