"""An alarm raises the ratio of replay from the next step on, and a run that was stopped anywhere goes on alike.

Stage `two` forgets stage `one` at every evaluation (every second step), since its learning rate is far too high. It has
a mixture whose weights change, so that the samples before a raise may not depend on what comes after it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed, step_of, step_path
from engine.checkpoint.load import read_state
from engine.config.load import load_run
from engine.config.resolve import resolve
from engine.config.save import FILE
from engine.errors import EXIT_DONE, ConfigError, DataError
from tests.distributed.poison import STABILITY
from tests.distributed.runs import Tree, run_config, run_tree
from tests.engine.train.fake import check_equal, fake_run, record_samples, spike, stopped_run, values

BORDER, LAST, BATCH = 4, 14, 8
RATIOS = [0.125, 0.5]
RAISED = [[1, 2, 0.125], [1, 4, 0.5]]
"""Rows of the train state: the evaluations after steps 2 and 4 of the second stage find that the first is forgotten."""
REPLAYED = [0, 0, 1, 1, 4, 4, 4, 4, 4, 4]
"""Replayed samples of each step of the second stage."""


def tree_of(corpus: Path, folder: Path, **evaluation: Any) -> Tree:
    tree = run_tree(corpus, folder)
    [stage] = tree["stages"]
    one = stage | {"name": "one", "duration": {"steps": BORDER}}
    sources = [{"name": name, "path": str(corpus / part)} for name, part in (("x", "validation"), ("y", "train"))]
    weights = [{"from_step": 0, "weights": {"x": 3, "y": 2}}, {"from_step": 6, "weights": {"x": 1, "y": 5}}]
    data = {key: value for key, value in stage["data"].items() if key != "train"}
    data |= {"sources": sources, "weights_table": weights, "validation": {"new": str(corpus / "train")}}
    two = stage | {"name": "two", "data": data, "global_batch_size": BATCH, "duration": {"steps": LAST - BORDER}}
    two |= {"replay": {"ratio": 0}, "schedule": {"shape": "constant", "learning_rate": 9.0}}
    alarm = {"every_steps": 2, "forgetting_limit": 1e-9, "on_forgetting": "raise", "raised_ratios": RATIOS}
    return tree | {
        "stages": [one, two],
        "evaluation": alarm | evaluation,
        "reservoir": {"rows": 1000, "span_tokens": 16},
        "checkpoint": tree.get("checkpoint", {}) | {"every_steps": 1, "keep_last": 99},
    }


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any, dict[int, list[Any]]]:
    folder, samples = tmp_path_factory.mktemp("whole") / "run", {}
    return folder, fake_run(tree_of(corpus, folder), record_samples(samples)), samples


def replayed_per_step(folder: Path) -> list[int]:
    counts = values(folder, "replay_samples")
    return [counts[step] - counts.get(step - 1, 0) for step in range(BORDER + 1, LAST + 1)]


def raised_at(folder: Path, step: int) -> list[Any]:
    return read_state(step_path(folder / "checkpoints", step)).sections["progress"]["raised_ratios"]


def test_an_alarm_raises_the_ratio_to_its_bound_from_the_next_step_on(corpus, whole, caplog):
    folder, run, _ = whole
    assert run.code == EXIT_DONE
    assert replayed_per_step(folder) == REPLAYED
    ratios = values(folder, "replay_ratio")
    assert [ratios[step] for step in range(BORDER + 1, LAST + 1)] == [0, 0, 0.125, 0.125, *[0.5] * 6]
    assert [raised_at(folder, BORDER + step) for step in (2, 3, 5, LAST - BORDER)] == [[], RAISED[:1], RAISED, RAISED]
    replay = load_run(folder / FILE).stages[1].replay
    assert replay is not None
    assert replay.ratio == 0, "the run file is as it was"


@pytest.mark.parametrize("step", [BORDER, 5, 6, 7, 8, 9, 11])
def test_a_stop_anywhere_changes_no_sample(corpus, whole, tmp_path, step):
    folder, run, samples = whole
    stopped_run(tree_of(corpus, tmp_path), step - 1, "forward and backward")
    found: dict[int, list[Any]] = {}
    again = fake_run(tree_of(corpus, tmp_path), record_samples(found))
    assert (again.code, again.started_at, again.at_end) == (EXIT_DONE, step, run.at_end)
    assert found == {number: ids for number, ids in samples.items() if number >= step}
    check_equal(tmp_path, folder)
    assert raised_at(tmp_path, LAST) == RAISED


@pytest.mark.parametrize("left", [6, 7, 8, 9])
def test_a_crash_after_the_evaluation_that_raised_it_changes_no_sample(corpus, whole, tmp_path, left):
    """The checkpoint of a step is saved before its evaluation: with 6 or 8 left it does not know of the raise."""
    folder, run, samples = whole
    stopped_run(tree_of(corpus, tmp_path), 10)
    for path in committed(tmp_path / "checkpoints"):
        if step_of(path) > left:
            shutil.rmtree(path)
    found: dict[int, list[Any]] = {}
    again = fake_run(tree_of(corpus, tmp_path), record_samples(found))
    assert (again.started_at, again.at_end) == (left, run.at_end)
    assert found == {number: ids for number, ids in samples.items() if number >= left}
    check_equal(tmp_path, folder)


def test_a_rollback_behind_the_raise_keeps_it(corpus, tmp_path):
    tree: dict[str, Any] = tree_of(corpus, tmp_path) | {"stability": STABILITY | {"window": 2, "spike_sigma": 1e5}}
    tree["stages"][1]["schedule"]["learning_rate"] = 3.5  # forgets step by step, without spikes of its own

    def prepare(trainer: Any) -> None:
        spike(trainer, (8, 9))
        go_back = trainer.go_back

        def going_back(first: int) -> None:
            trainer.checkpoints.settle()
            for path in committed(tmp_path / "checkpoints"):
                if step_of(path) > 8:
                    shutil.rmtree(path)
            go_back(first)

        trainer.go_back = going_back

    run = fake_run(tree, prepare)
    assert (run.code, run.state.step, run.state.rollbacks) == (EXIT_DONE, LAST, 1)
    # raised after step 8, whose checkpoint does not know of it
    assert run.state.raised_ratios == [(1, 4, 0.125)]
    assert replayed_per_step(tmp_path) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_the_ratio_of_the_run_file_may_still_be_larger(corpus, tmp_path):
    tree = tree_of(corpus, tmp_path)
    tree["stages"][1]["replay"] = {"ratio": [{"from_step": 0, "ratio": 0}, {"from_step": 5, "ratio": 0.75}]}
    assert fake_run(tree).code == EXIT_DONE
    assert replayed_per_step(tmp_path) == [0, 0, 1, 1, 4, 6, 6, 6, 6, 6]


def test_a_run_stage_without_replay_is_warned_of(corpus, tmp_path, caplog):
    tree = tree_of(corpus, tmp_path)
    [one, two] = tree["stages"]
    three = two | {"name": "three", "duration": {"steps": 2}}
    two = {key: value for key, value in two.items() if key != "replay"}
    assert fake_run({**tree, "stages": [one, two, three]}).code == EXIT_DONE
    assert [text for text in caplog.messages if "cannot be raised further" in text]


@pytest.mark.parametrize(
    ("evaluation", "replay", "message"),
    [
        ({}, None, "no run stage behind the first one replays anything"),
        ({"raised_ratios": [0.5, 0.125]}, {"ratio": 0}, r"raised_ratios = \[0.5, 0.125\]"),
        ({"raised_ratios": [0.5, 0.5]}, {"ratio": 0}, r"raised_ratios = \[0.5, 0.5\]"),
        ({"raised_ratios": [0.5, 1.0]}, {"ratio": 0}, r"raised_ratios = \[0.5, 1.0\]"),
        ({"raised_ratios": []}, {"ratio": 0}, r"on_forgetting = raise with evaluation.raised_ratios = \[\]"),
        ({"on_forgetting": "warn"}, {"ratio": 0}, "on_forgetting = warn with"),
        ({"forgetting_limit": None}, {"ratio": 0}, "raise without evaluation.forgetting_limit"),
    ],
)
def test_alarms_that_cannot_do_what_they_say_are_refused(corpus, tmp_path, evaluation, replay, message):
    tree = tree_of(corpus, tmp_path, **evaluation)
    tree["stages"][1]["replay"] = replay
    with pytest.raises(ConfigError, match=message):
        resolve(run_config(tree), 1)


def test_a_ratio_that_the_replayed_data_cannot_serve_is_refused_before_the_stage(corpus, tmp_path):
    tree = tree_of(corpus, tmp_path) | {"reservoir": {"rows": 2, "span_tokens": 16}}
    with pytest.raises(DataError, match=r"evaluation.raised_ratios: 0.5 of a step of 8 samples are 4, and stage two"):
        fake_run(tree)
