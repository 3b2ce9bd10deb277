"""Rows of an objective as pure functions of the sample: packed, masked, paired, corrupted."""
