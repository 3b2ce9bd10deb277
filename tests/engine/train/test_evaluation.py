"""Runs of two stages over a fake pipeline tell what the second one forgets, and can be stopped by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from engine.train.evaluation import Forgotten
from tests.distributed.runs import Tree, run_config, run_tree
from tests.engine.train.fake import fake_run, values

BORDER, LAST = 4, 9


def a_run(corpus: Path, folder: Path, **evaluation: Any) -> Tree:
    """The second stage raises the loss on the first one's set: its learning rate is far too high."""
    tree = run_tree(corpus, folder)
    tree["evaluation"] = {"every_steps": 1} | evaluation
    [stage] = tree["stages"]
    data = {"train": str(corpus / "train"), "validation": {"new": str(corpus / "train")}}
    schedule = {"shape": "constant", "learning_rate": 9.0}
    second = {"name": "two", "duration": {"steps": LAST - BORDER}, "data": data, "schedule": schedule}
    tree["stages"] = [stage | {"name": "one", "duration": {"steps": BORDER}}, stage | second]
    return tree


@pytest.fixture(scope="module")
def rises(corpus, tmp_path_factory) -> dict[int, float]:
    """Rise of the first stage's loss at each step of the second, where nothing reacts to it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fake_run(a_run(corpus, folder))
    at_home = values(folder, "validation_loss")[BORDER]
    losses = values(folder, "validation_loss/one")
    found = values(folder, "forgetting/one")
    assert found == {step: loss - at_home for step, loss in losses.items()}
    assert sorted(found) == list(range(BORDER + 1, LAST + 1))
    assert values(folder, "forgetting") == found, "the mean of one"
    return found


def first_beyond(rises: dict[int, float], limit: float) -> int:
    return next(step for step, rise in rises.items() if rise > limit)


def test_a_run_warns_and_goes_on(rises, corpus, tmp_path, caplog):
    limit = max(rises.values()) / 2
    assert fake_run(a_run(corpus, tmp_path / "run", forgetting_limit=limit)).code == EXIT_DONE
    warned = [text for text in caplog.messages if "has risen beyond" in text]
    assert len(warned) == sum(rise > limit for rise in rises.values())
    assert f"step {first_beyond(rises, limit)}" in warned[0]


def test_a_run_is_stopped_with_a_checkpoint_and_goes_on_from_it(rises, corpus, tmp_path):
    limit = max(rises.values()) / 2
    stops_at = first_beyond(rises, limit)
    tree = a_run(corpus, tmp_path / "run", forgetting_limit=limit, on_forgetting="stop")
    with pytest.raises(Forgotten, match=f"step {stops_at}: .* one by ") as caught:
        fake_run(tree)
    assert caught.value.exit_code == EXIT_USAGE, "no supervisor starts it again by itself"
    again = fake_run(tree | {"evaluation": {"every_steps": 1}})
    assert (again.code, again.started_at, again.state.step) == (EXIT_DONE, stops_at, LAST)
    assert values(tmp_path / "run", "forgetting/one") == rises, "as if nothing had happened"


def test_a_reaction_without_a_limit_is_refused(corpus, tmp_path):
    from engine.config.resolve import resolve

    with pytest.raises(ConfigError, match="without evaluation"):
        resolve(run_config(a_run(corpus, tmp_path / "run", on_forgetting="stop")), 1)


def test_an_evaluation_that_a_restart_makes_up_for_tells_it_too(rises, corpus, tmp_path):
    tree = a_run(corpus, tmp_path / "run")
    tree["checkpoint"] = {"every_steps": 1}

    class Stop:
        stop_requested = False

    signals = Stop()

    def stop_at_six(trainer: Any) -> None:
        step = trainer._step
        trainer._step = lambda: (setattr(signals, "stop_requested", trainer.state.step == 5), step())[1]

    assert fake_run(tree, stop_at_six, signals=signals).state.step == 6
    assert 6 not in values(tmp_path / "run", "forgetting/one"), "the signal came before its evaluation"
    assert fake_run(tree).started_at == 6
    assert values(tmp_path / "run", "forgetting/one") == rises
