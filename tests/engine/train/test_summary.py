import json

import pytest

from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.train.state import TrainState
from engine.train.summary import Spent, summary
from tests.distributed.runs import run_config, run_tree


def spent() -> Spent:
    """20 s of steps, 3 of them for data, 5 s of evaluation in two parts, and 2,000 tokens."""
    now = [0.0]
    found = Spent(clock=lambda: now[0])
    found.step(12.0, 1.0, 1000)
    found.step(8.0, 2.0, 1000)
    for seconds in (2.0, 3.0):
        with found.phase("evaluation"):
            now[0] += seconds
    return found


@pytest.fixture
def config(tmp_path):
    return run_config(run_tree(tmp_path, tmp_path, name="mine", logging={"plot": True}))


def test_the_summary_says_what_came_of_the_run(config):
    records = [
        {"step": 3, "validation_loss": 2.5},
        {"step": 6, "validation_loss": 2.25},
        {"step": 9, "validation_loss": 3},
    ]
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    text = summary(config, TrainState(step=9, tokens=12345, loss=1.5), spent(), 40.0, EXIT_DONE)
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert lines[0] == ["run", f"mine in {config.folder}"]
    assert "9 of 9 steps, 12,345 tokens (done)" in text
    assert "1.5000" in text
    assert "best 2.2500 at step 6, last 3.0000 at step 9" in text
    assert "100 tokens/s in steps, 50 over all of this start" in text
    assert "40 s: steps 20 s, evaluation 5 s, other 15 s (of the steps 3 s for data)" in text
    assert f"metrics.jsonl, loss.png in {config.folder}" in text


def test_a_run_that_is_stopped_says_that_it_can_go_on_and_leaves_out_what_it_has_not(config):
    text = summary(config, TrainState(), Spent(), 4.0, EXIT_REQUEUE)
    assert "(saved; start it again to go on)" in text
    assert "validation" not in text
    assert "tokens/s" not in text
    assert "checkpoint" not in text
