"""The reservoir's benchmark runs, and its turns are what they are called."""

import json

from bench.reservoir import SHARD_ROWS, cpu_seconds, traced, turns
from tests.readme import REPOSITORY

RESULT = "cpu-reservoir-2026-11-30.json"


def test_turns_are_measured():
    found = turns(8 * SHARD_ROWS, cpu_seconds)
    assert found["fill"]["rows"] == 8 * SHARD_ROWS
    assert 0 < found["write what 10 shards changed"]["rows"] < 8 * SHARD_ROWS
    assert all(turn["peak_mb"] >= turn["held_mb"] > 0 for turn in turns(8 * SHARD_ROWS, traced).values())


def test_the_documentation_says_what_was_measured():
    text = " ".join((REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").split())
    assert RESULT in text
    found = json.loads((REPOSITORY / "bench" / "results" / RESULT).read_text(encoding="utf-8"))
    held, peak = (max(turn[key] for turn in found["memory"].values()) for key in ("held_mb", "peak_mb"))
    slowest = min(found["speed"][turn]["rows_per_cpu_second"] for turn in ("fill", "as many rows again"))
    assert held <= 200
    assert peak <= 400
    assert slowest >= 300_000
    assert f"takes {held:.0f} MB of memory on each rank, and {peak:.0f} MB at the most" in text
    assert f"{slowest / 1e6:.2f} million rows or more are admitted per CPU-second" in text
