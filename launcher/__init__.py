"""Start of runs: rank environments, command lines of the launchers, supervision. Never imports torch."""
