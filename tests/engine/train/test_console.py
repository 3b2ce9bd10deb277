import pytest

from engine.train.console import Pace, Terminal, losses
from tests.engine.train.short_runs import run, stage


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def record(step: int, loss: float = 1.0, seconds: float = 2.0) -> dict[str, float | int]:
    return {
        "step": step,
        "loss": loss,
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens_per_second": 10.0,
        "step_seconds": seconds,
    }


def test_terminal_shows_what_was_asked_for(capsys):
    clock = Clock()
    terminal = Terminal(run(stage(5), every_steps=2), clock)
    for step in range(1, 6):
        clock.seconds += 2.0
        terminal.write(record(step))
    terminal.write({"step": 5, "validation_loss": 3.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5", "5/5"]
    assert "loss 1.0000" in lines[0]
    assert lines[0].endswith("  6 s left")
    assert "left" not in lines[2], "nothing is left after the last step"
    assert lines[-1].endswith("validation loss 3.2500")


def test_terminal_tells_of_every_skipped_step_and_of_rollbacks(capsys):
    terminal = Terminal(run(stage(500), every_steps=100))
    skipped = record(7) | {"skipped": 1}
    del skipped["gradient_norm"]
    terminal.write(skipped)
    terminal.write({"step": 4, "rollback": 2, "left_out_from": 32, "left_out_to": 48})
    lines = capsys.readouterr().out.splitlines()
    assert "norm nan  skipped  lr" in lines[0]
    assert lines[1].split(maxsplit=2)[2] == "again: rollback 2, 16 samples left out"


def test_every_loss_is_shown():
    trained = {"step": 1, "loss": 3.0, "mlm_loss": 2.0, "nsp_loss": 1.0, "loss/web": 3.5, "loss/my_loss": 2.5}
    assert losses(trained, "loss") == "loss 3.0000 (mlm 2.0000, nsp 1.0000, web 3.5000, my_loss 2.5000)"
    held_out = {"validation_loss": 3.0, "mlm_validation_loss": 2.0, "nsp_validation_loss": 1.0, "validation_loss/a": 4}
    assert losses(held_out, "validation_loss") == "loss 3.0000 (mlm 2.0000, nsp 1.0000, a 4.0000)"
    assert losses(trained | held_out, "loss") == losses(trained, "loss")
    both = {"loss": 3.0, "mlm_loss": 2.0, "loss/a_loss": 2.5, "mlm_loss/web": 1.5, "mlm_validation_loss/web": 9.0}
    assert losses(both, "loss") == "loss 3.0000 (mlm 2.0000, a_loss 2.5000, web mlm 1.5000)"


def test_a_loss_that_is_no_number_is_shown_as_that():
    assert losses({"step": 1}, "loss") == "loss nan"


def test_time_left_counts_evaluations_and_checkpoints():
    """Steps of 1 s, and 30 s beside after every 60: a quarter of the time, half as much again as the steps take."""
    clock, pace = Clock(), Pace(run(stage(100_000)))
    pace._clock = clock
    for step in range(1, 6001):
        clock.seconds += 1.0
        pace.count(step, 1.0)
        if step % 60 == 0:
            clock.seconds += 30.0
    assert pace.seconds_left(6000) == pytest.approx(94_000 * 1.5, rel=0.05)  # a burst is 60 / 1000 of what is smoothed


def test_a_slow_step_moves_the_estimate_little_and_the_first_one_not_at_all():
    clock, pace = Clock(), Pace(run(stage(1000)))
    pace._clock = clock
    for step, seconds in enumerate([300.0] + [1.0] * 99, start=1):
        clock.seconds += seconds
        pace.count(step, seconds)
    assert pace.seconds_left(100) == pytest.approx(900)
    clock.seconds += 11.0
    pace.count(101, 11.0)
    assert pace.seconds_left(101) == pytest.approx(899 * (1 + 10 / 50))


def test_time_left_follows_a_ramp():
    """Steps of 2 samples take 2 s; those of 8 to come take 8 s."""
    ramped = stage(20, global_batch_size=8, batch_ramp=[{"size": 2, "until_step": 10}])
    clock, pace = Clock(), Pace(run(ramped))
    pace._clock = clock
    for step in range(1, 6):
        clock.seconds += 2.0
        pace.count(step, 2.0)
    assert pace.seconds_left(5) == pytest.approx(5 * 2 + 10 * 8)


def test_time_left_and_steps_are_those_of_all_run_stages(capsys):
    """Ten steps of 4 x 8 tokens at 2 s, then five of 8 x 16 tokens, each four times as long."""
    config = run(stage(10), stage(5, sequence_length=16, global_batch_size=8))
    clock, pace = Clock(), Pace(config)
    pace._clock = clock
    for step in range(1, 6):
        clock.seconds += 2.0
        pace.count(step, 2.0)
    assert pace.seconds_left(5) == pytest.approx(5 * 2 + 5 * 8)
    Terminal(config).write(record(11))
    assert capsys.readouterr().out.startswith("step     11/15  ")
