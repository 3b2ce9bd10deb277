"""The comparison of schedules: a replay that knows the formulas, and the whole of it at toy size."""

import json

import pytest

from bench import schedule
from bench.replay import levelled, replay
from engine.parallel.schedule import Backward, BackwardInput, BackwardWeight, Forward, instructions
from engine.plan.pipeline import bubble

SECONDS = {Forward: 1.0, Backward: 2.0, BackwardInput: 1.0, BackwardWeight: 1.0}


def spans(name, pipe, chunks, count, slow=1.0):
    """Every stage's instructions, those of the last one `slow` times as long."""
    return [
        [
            (one, SECONDS[type(one)] * (slow if stage == pipe - 1 else 1.0))
            for one in instructions(name, stage, pipe, chunks, count)
        ]
        for stage in range(pipe)
    ]


@pytest.mark.parametrize("pipe", [2, 3, 4])
@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 2), ("zb-h1", 1)])
def test_a_replay_of_equal_stages_waits_as_long_as_the_plan_says(name, chunks, pipe):
    found = replay(spans(name, pipe, chunks, count=12), chunks)
    assert found.idle_share == pytest.approx(float(bubble(name, pipe, chunks, 12)), abs=1e-12)
    assert found.busy == (3.0 * 12 * chunks,) * pipe


def test_a_slow_stage_lets_the_others_wait():
    uneven = spans("1f1b", 2, 1, count=8, slow=1.5)
    assert replay(uneven, 1).length == 8 * 4.5 + 1 + 2, "what lies before and behind the slow one, and its own work"
    assert replay(levelled(uneven), 1).idle_share == pytest.approx(1 / 9)


def test_a_schedule_that_cannot_run_is_no_figure():
    order = spans("1f1b", 2, 1, count=2)
    with pytest.raises(AssertionError, match="deadlock"):
        replay([order[0][::-1], order[1]], 1)


@pytest.mark.parametrize(
    "sides", [["GPipe", "1F1B"], pytest.param(list(schedule.SIDES), marks=pytest.mark.matrix)], ids=["two", "all"]
)
def test_schedules_are_measured_and_written(tmp_path, monkeypatch, sides):
    monkeypatch.setattr(schedule, "SIDES", {name: schedule.SIDES[name] for name in sides})
    output = tmp_path / "schedule.json"
    schedule.main(rounds=5, steps=1, stages=[2], small=True, output=output)
    result = json.loads(output.read_text())
    found = result["stages"]["2"]
    assert list(found) == sides
    assert result["machine"]["versions"]["torch"]
    for name, row in found.items():
        assert all(stage["held"] == stage["plan"] for stage in row["in_flight"]), name
        assert 0 < row["idle_share"]["as_measured"]["median"] < 1
        assert set(row["mean_seconds"]) == (
            {"Forward", "BackwardInput", "BackwardWeight"} if name == "ZB-H1" else {"Forward", "Backward"}
        )
    assert found["1F1B"]["step_over_1f1b"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert found["GPipe"]["step_bytes"][0] > found["1F1B"]["step_bytes"][0], "all micro-batches against two"
