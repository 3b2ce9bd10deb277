"""What a run's configuration holds: each field is documented where it stands. `run` has all of it."""
