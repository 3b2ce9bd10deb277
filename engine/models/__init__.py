"""Models as plain modules with no process group in sight; `families` knows what each family exports."""
