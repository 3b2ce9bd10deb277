"""Models as plain modules with no process group in sight; each family exports `build`, `specs` and `sharding`."""
