"""The reservoir's benchmark runs, and its turns are what they are called."""

from bench.reservoir import SHARD_ROWS, cpu_seconds, traced, turns


def test_turns_are_measured():
    found = turns(8 * SHARD_ROWS, cpu_seconds)
    assert found["fill"]["rows"] == 8 * SHARD_ROWS
    assert 0 < found["write what 10 shards changed"]["rows"] < 8 * SHARD_ROWS
    assert all(turn["peak_mb"] >= turn["held_mb"] > 0 for turn in turns(8 * SHARD_ROWS, traced).values())
