"""Starting runs: where a rank stands, command lines of the launchers, supervision. Never imports torch."""
