"""The sections of a run's configuration: each field is documented where it stands. Begin with `run`."""
