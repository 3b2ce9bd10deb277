"""A run ends once its evaluations no longer improve, at the same step and with the same best checkpoint wherever it was
stopped, and its best checkpoint stays."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.checkpoint.folder import committed, step_of
from engine.config.load import merge
from engine.config.resolve import check
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.train.best import best_checkpoint
from engine.train.best_link import LINK
from engine.train.early_stopping import EarlyStopping
from tests.distributed.runs import Tree, run_config, run_tree
from tests.engine.train.fake import check_equal, fake_run, stopped_run, values

EVERY, LAST = 2, 20


def tree_of(corpus: Path, folder: Path, **changes: Any) -> Tree:
    """A run whose validation loss falls at first and rises then: its warm-up goes on beyond measure."""
    tree = run_tree(corpus, folder)
    [stage] = tree["stages"]
    stage |= {"duration": {"steps": LAST}, "schedule": {"warmup": LAST, "learning_rate": 12.0}}
    ours: Tree = {
        "evaluation": {"every_steps": EVERY, "early_stopping": {"patience": 2}},
        "checkpoint": {"every_steps": EVERY, "keep_last": 1, "keep_best": 1},
    }
    return merge(tree | {"stages": [stage]}, merge(ours, changes))


def saved_steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in committed(folder / "checkpoints"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fake_run(tree_of(corpus, folder))


def test_a_run_ends_after_its_patience_and_keeps_its_best_checkpoint(whole):
    folder, run = whole
    losses = values(folder, "validation_loss")
    best = min(losses, key=lambda step: losses[step])
    assert EVERY < best < LAST - 3 * EVERY, "the loss falls, and rises long before the last step"
    assert (run.code, run.state.step) == (EXIT_DONE, best + 2 * EVERY)
    assert list(losses) == list(range(EVERY, run.state.step + 1, EVERY))
    assert saved_steps(folder) == [best, run.state.step]
    assert step_of((folder / LINK).resolve()) == best


@pytest.mark.parametrize(
    ("phase", "before_end"),
    [("forward and backward", 5), ("forward and backward", 0), ("evaluation", 2), ("evaluation", 0)],
)
def test_a_run_that_is_stopped_anywhere_ends_and_chooses_alike(corpus, whole, tmp_path, phase, before_end):
    folder, run = whole
    tree = tree_of(corpus, tmp_path / "run", checkpoint={"asynchronous": phase != "evaluation"})
    stopped = stopped_run(tree, run.state.step - before_end - (phase != "evaluation"), phase)
    assert stopped.code == EXIT_REQUEUE
    again = fake_run(tree)
    assert (again.code, again.state, again.at_end) == (EXIT_DONE, run.state, run.at_end)
    check_equal(tmp_path / "run", folder)
    assert saved_steps(tmp_path / "run") == saved_steps(folder)
    assert (tmp_path / "run" / LINK).readlink() == (folder / LINK).readlink()


def test_a_run_that_lost_its_last_checkpoints_ends_alike(corpus, whole, tmp_path):
    """A kill between a checkpoint and the evaluation that comes after it, or after the decision to end."""
    folder, run = whole
    tree = tree_of(corpus, tmp_path, checkpoint={"keep_last": 99})
    fake_run(tree)
    for left in range(run.state.step - EVERY, 0, -2 * EVERY):
        for path in committed(tmp_path / "checkpoints"):
            if step_of(path) > left:
                shutil.rmtree(path)
        again = fake_run(tree)
        assert (again.started_at, again.state, again.at_end) == (left, run.state, run.at_end)
        check_equal(tmp_path, folder)
        assert (tmp_path / LINK).readlink() == (folder / LINK).readlink()


def test_an_end_between_two_checkpoints_is_saved(corpus, whole, tmp_path):
    _, run = whole
    changes = {"every_steps": 5, "keep_best": 0}
    assert fake_run(tree_of(corpus, tmp_path, checkpoint=changes)).state == run.state
    assert saved_steps(tmp_path)[-1] == run.state.step
    again = fake_run(tree_of(corpus, tmp_path, checkpoint=changes))
    assert (again.started_at, again.at_end) == (run.state.step, run.at_end), "nothing is trained again"


def test_more_patience_lets_an_ended_run_go_on(corpus, whole, tmp_path):
    folder, run = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    again = fake_run(tree_of(corpus, tmp_path, evaluation={"early_stopping": {"patience": 3}}))
    assert (again.started_at, again.state.step) == (run.state.step, run.state.step + EVERY)


def judged(metric: str, found: list[float], **config: Any) -> list[int]:
    """Numbers of the evaluations (from 1) that were improvements, up to the end."""
    tree = run_tree(Path("c"), Path("r"))
    tree["evaluation"] = {"every_steps": 1, "early_stopping": {"patience": 2, "metric": metric} | config}
    hook, improved = EarlyStopping(run_config(tree)), []
    for step, value in enumerate(found, start=1):
        if hook.ends_early():
            break
        hook.take_record({"step": step, metric: value, "validation_seconds": 0.1})
        hook.take_record({"step": step, metric: -9.0 if hook.metric != "validation_loss" else 9.0, "validation_x": 1})
        if hook.progress.best_step == step:
            improved.append(step)
    return [*improved, -hook.progress.step]


@pytest.mark.parametrize(
    ("metric", "found", "config", "expected"),
    [
        ("validation_loss", [3, 2, 2, 1, 1, 1, 0], {}, [1, 2, 4, -6]),
        ("validation_accuracy", [0.5, 0.5, 0.6, 0.1, 0.6, 0.9], {}, [1, 3, -5]),
        ("validation_mean_squared_error", [3, 2, 4, 5, 0], {}, [1, 2, -4]),
        ("validation_loss", [3, 2.9, 2.7, 2.6, 2.55, 1], {"min_delta": 0.25}, [1, 3, -5]),
        ("validation_loss", [math.nan, math.nan, 1], {}, [-2]),
        ("validation_loss", [math.inf, 3, math.nan, 4, 1], {}, [2, -4]),
    ],
)
def test_improvements_are_counted_in_the_direction_of_the_metric(metric, found, config, expected):
    assert judged(metric, found, **config) == expected


def test_of_equal_values_the_earliest_is_the_best(corpus, tmp_path):
    fake_run(tree_of(corpus, tmp_path, checkpoint={"keep_last": 99}))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"validation_loss": ', '"validation_x": 0, "y": '))
    best = best_checkpoint(tmp_path, "validation_x")
    assert best is not None
    assert step_of(best) == EVERY


def test_an_early_end_is_no_run_that_was_cut_off(tmp_path):
    outcome.write(tmp_path, outcome.Outcome("j", 0, EXIT_DONE, 5, early=True))
    found = outcome.read(tmp_path)
    assert found is not None
    assert found.ends(20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"early_stopping": {"metric": "validation_accuracy"}}}, "watches validation_accuracy"),
        ({"evaluation": {"early_stopping": {"metric": "loss"}}}, "watches loss, which no evaluation"),
        ({"evaluation": {"every_steps": None}, "checkpoint": {"keep_best": 0}}, "without evaluation.every_steps"),
        ({"checkpoint": {"best_metric": "validation_acuracy"}}, "checkpoint.best_metric = validation_acuracy"),
    ],
)
def test_what_cannot_be_watched_is_refused(corpus, tmp_path, changes, said):
    found = [str(problem) for problem in check(run_config(tree_of(corpus, tmp_path, **changes)))]
    assert any(said in problem for problem in found), found


def test_early_stopping_of_several_stages_is_refused(corpus, tmp_path):
    tree = tree_of(corpus, tmp_path)
    tree["stages"] = [*tree["stages"], tree["stages"][0] | {"name": "two"}]
    assert any("in a run of 2 stages" in str(problem) for problem in check(run_config(tree)))
