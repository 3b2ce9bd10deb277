"""The comparison of saves at toy size: every side saves what it says it saves, and figures follow from the turns."""

import json

import pytest

from bench import checkpoint, savers


def test_all_sides_save_and_the_figures_are_written(tmp_path):
    output = tmp_path / "checkpoint.json"
    checkpoint.main(rounds=5, small=True, folder=tmp_path, output=output)
    result = json.loads(output.read_text())
    sides = result["sides"]
    assert list(sides) == [
        checkpoint.OURS,
        checkpoint.OURS_SYNC,
        checkpoint.MEMORY,
        checkpoint.NATIVE,
        checkpoint.DCP,
        checkpoint.DCP_ASYNC,
    ]
    for name, row in sides.items():
        assert len(row["turns"]) == 5
        waits = name not in (checkpoint.OURS, checkpoint.MEMORY, checkpoint.DCP_ASYNC)
        for turn in row["turns"]:
            assert waits == (turn["after"] == [])
            assert turn["durable"] >= turn["stall"] > 0
    assert sides[checkpoint.OURS_SYNC]["stall_over_our_synchronous"]["median"] == 1.0
    assert {"processor", "versions", "commit"} <= result["machine"].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"], "what was written is removed"


def test_stall_and_drag():
    turn = savers.Turn(ordinary=[1.0, 9.0, 2.0], stall=0.5, after=[3.0, 2.5], durable=6.0)
    assert checkpoint.drag(turn) == pytest.approx(1.5)
    other = savers.Turn(ordinary=[1.0], stall=2.0, after=[], durable=2.0)
    turns = {checkpoint.OURS: [turn], checkpoint.OURS_SYNC: [other], checkpoint.NATIVE: [other]}
    ratio = checkpoint.figures(turns)[checkpoint.OURS]["stall_over_our_synchronous"]
    assert ratio == {"median": 0.25, "least": 0.25, "greatest": 0.25}
