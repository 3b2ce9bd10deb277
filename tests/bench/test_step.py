"""The CPU comparison at toy size: every side computes the same, and what is printed follows from what was measured."""

import json
import math

import pytest

from bench import step
from bench.command import run
from bench.contest import Contestant, ContestFailed, Lap, Spread, ratios, run_rounds
from engine.errors import EXIT_FAILURE


def test_all_sides_agree_and_the_figures_are_written(tmp_path, capsys):
    output = tmp_path / "step.json"
    step.main(rounds=5, steps=1, threads=1, precision=step.PrecisionChoice.FP32, small=True, output=output)
    result = json.loads(output.read_text())
    sides = result["fp32"]
    assert list(sides) == [
        step.TRAINER,
        step.PLAIN,
        step.MODULES,
        "ours, ZeRO-0",
        "ours, ZeRO-1",
        "ours, ZeRO-3",
    ]
    for row in sides.values():
        # nearly uniform logits at first, so log of the vocabulary; then Adam has moved every side alike
        assert row["losses"][0] == pytest.approx(math.log(250), abs=0.05)
        assert row["losses"] == pytest.approx(sides[step.PLAIN]["losses"], abs=step.FP32_TOLERANCE)
        assert row["cpu_over_trainer"]["least"] <= row["cpu_over_trainer"]["median"]
        assert row["cpu_seconds_per_step"]["median"] > 0
    assert len(set(sides[step.PLAIN]["losses"])) == step.CHECK_STEPS
    assert sides[step.TRAINER]["cpu_over_trainer"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert {"processor", "versions", "commit", "load_average"} <= result["machine"].keys()
    printed = capsys.readouterr().out
    assert all(name in printed for name in sides)


def test_a_side_that_computes_something_else_is_not_timed():
    losses = {step.TRAINER: [5.0, 4.0], "ours": [5.0, 4.001]}
    step.check_losses(losses, 2e-3)
    with pytest.raises(ContestFailed, match="ours computes something else"):
        step.check_losses(losses, 1e-4)
    with pytest.raises(ContestFailed, match="equal within"):
        step.check_losses({**losses, "ours": [math.nan, 4.0]}, 2e-3)


def test_ratios_are_formed_within_a_round():
    ours = [Lap(1.0, 2.0, []), Lap(1.0, 40.0, []), Lap(1.0, 3.0, [])]
    theirs = [Lap(2.0, 4.0, []), Lap(4.0, 50.0, []), Lap(1.0, 4.0, [])]
    assert ratios(ours, theirs) == Spread(0.75, 0.5, 0.8)
    assert ratios(ours, theirs, "wall_seconds") == Spread(0.5, 0.25, 1.0)
    assert str(Spread(0.75, 0.5, 0.8)) == "0.750 (0.500..0.800)"


def test_turns_rotate_and_each_side_does_its_steps():
    order = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def lap(self, num_steps):
            order.append((self.name, num_steps))
            return Lap(1.0, 1.0, [])

    laps = run_rounds([Fake("a"), Fake("b")], 3, 4)  # type: ignore[list-item]
    assert order == [("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 4), ("b", 4)]
    assert [len(own) for own in laps.values()] == [3, 3]


def count_steps(turns, begin):
    """A contestant whose loss is the number of its step."""
    for number in range(begin, 100):
        turns.begin_step()
        turns.loss(number)


def fail(turns):
    raise ValueError("no such luck")


def test_a_contestant_goes_on_where_it_stopped():
    contestant = Contestant("counting", "forkserver", count_steps, 7)
    try:
        contestant.wait_ready()
        assert contestant.lap(2).losses == [7.0, 8.0]
        assert contestant.lap(3).losses == [9.0, 10.0, 11.0]
    finally:
        contestant.end()


def test_a_contestant_that_fails_says_why():
    contestant = Contestant("unlucky", "forkserver", fail)
    with pytest.raises(ContestFailed, match=r"unlucky failed:(?s:.*)no such luck") as raised:
        contestant.wait_ready()
    contestant.end()
    assert raised.value.exit_code == EXIT_FAILURE


def test_a_contestant_that_dies_or_hangs_is_named():
    contestant = Contestant("dead", "forkserver", count_steps, 0)
    contestant.wait_ready()
    contestant._worker._process.kill()
    with pytest.raises(ContestFailed, match="dead: its process ended"):
        contestant._worker.receive(60.0)
    contestant.end()
    waiting = Contestant("waiting", "forkserver", count_steps, 0)
    waiting.wait_ready()
    with pytest.raises(ContestFailed, match="waiting: no answer within 0 seconds"):
        waiting._worker.receive(0.0)


def test_the_command_shows_errors_without_a_traceback(capsys, monkeypatch):
    def main():
        raise ContestFailed("this is wrong", "that is allowed", "do this")

    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == EXIT_FAILURE
    assert capsys.readouterr().err == "error: this is wrong\n  allowed: that is allowed\n  to do: do this\n"
