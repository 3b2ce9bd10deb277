"""Training: builds a rank's part of a run, drives its steps, and keeps what a restart needs."""
