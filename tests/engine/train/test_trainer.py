"""The training loop over a fake pipeline: steps, records, evaluations, saves, stops and starts."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed, step_of
from engine.config.load import merge
from engine.data.prefetch import Prefetcher
from engine.errors import EXIT_DONE, EXIT_REQUEUE, CheckpointError, ConfigError, DataError
from engine.train.metrics import read_metrics
from tests.distributed.runs import run_tree
from tests.engine.train.fake import FakeRun, StopAfter, check_equal, fake_run, stopped_run, values


def saved_steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in committed(folder / "checkpoints"))


@dataclass(frozen=True)
class Whole:
    """A run of nine steps that nothing disturbed; do not change its folder."""

    tree: dict[str, Any]
    run: FakeRun

    @property
    def folder(self) -> Path:
        return Path(self.tree["folder"])

    def tree_in(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """Return the tree of this run in another folder."""
        return merge(deepcopy(self.tree), {"folder": str(folder), **changes})


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Whole:
    tree = run_tree(corpus, tmp_path_factory.mktemp("whole") / "run")
    return Whole(tree, fake_run(tree))


def test_a_run_trains_evaluates_and_saves_at_its_cadence(whole):
    folder, run = whole.folder, whole.run
    assert (run.code, run.started_at) == (EXIT_DONE, 0)
    assert (run.state.step, run.state.updates, run.state.samples, run.state.tokens) == (9, 9, 72, 72 * 16)
    assert [*values(folder, "loss")] == list(range(1, 10))
    assert [*values(folder, "validation_loss")] == [3, 6, 9]
    assert saved_steps(folder) == [3, 6, 9]
    assert values(folder, "loss")[9] < values(folder, "loss")[1]
    assert run.at_end != run.at_start
    assert run.state.loss == values(folder, "loss")[9]


def test_the_rank_says_where_it_is_in_a_step(corpus, tmp_path):
    beats: list[tuple[int, str]] = []

    def listen(trainer: Any) -> None:
        trainer.heart.beat = lambda step, phase: beats.append((step, phase))

    tree = run_tree(corpus, tmp_path / "run")
    tree["stages"][0] |= {"duration": {"steps": 1}, "schedule": {}}
    fake_run(tree, listen)
    step = [(0, phase) for phase in ("data", "forward and backward", "loss", "optimizer step")]
    assert beats[:5] == [*step, (1, "save")]
    assert set(beats[5:-1]) == {(1, "evaluation")}
    assert beats[-1] == (1, "end")


@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_a_stop_saves_where_it_is_and_the_next_start_goes_on_bitwise(whole, tmp_path, step):
    tree, run = whole.tree_in(tmp_path / "run"), whole.run
    stopped = stopped_run(tree, step - 1, "forward and backward")
    assert (stopped.code, stopped.state.step) == (EXIT_REQUEUE, step)
    assert saved_steps(tmp_path / "run") == sorted({*range(3, step, 3), step})
    again = fake_run(tree)
    assert (again.code, again.started_at) == (EXIT_DONE, step)
    assert (again.at_start, again.at_end, again.state) == (stopped.at_end, run.at_end, run.state)
    check_equal(tmp_path / "run", whole.folder)


def test_a_stop_before_the_first_step_leaves_no_checkpoint(corpus, tmp_path, monkeypatch):
    """The data never comes, so no step can be finished."""
    monkeypatch.setattr(Prefetcher, "wait", lambda self, seconds: False)
    tree = run_tree(corpus, tmp_path / "run")
    stopped = stopped_run(tree, 0)
    assert (stopped.code, stopped.state.step, saved_steps(tmp_path / "run")) == (EXIT_REQUEUE, 0, [])


def test_a_stop_while_data_is_waited_for_saves_the_step_before(whole, tmp_path, monkeypatch):
    tree, run = whole.tree_in(tmp_path / "run"), whole.run
    with monkeypatch.context() as patched:
        wait = Prefetcher.wait
        patched.setattr(Prefetcher, "wait", lambda self, seconds: not signals.stop_requested and wait(self, seconds))
        signals = StopAfter(4, "data")
        stopped = fake_run(tree, signals.prepare, signals=signals)
    assert (stopped.code, stopped.state.step) == (EXIT_REQUEUE, 4)
    assert fake_run(tree).at_end == run.at_end


def test_an_evaluation_that_a_stop_cut_short_is_made_by_the_next_start(whole, tmp_path):
    tree, run = whole.tree_in(tmp_path / "run"), whole.run
    stopped = stopped_run(tree, 6, "evaluation")
    assert (stopped.code, stopped.state.step) == (EXIT_REQUEUE, 6)
    assert [*values(tmp_path / "run", "validation_loss")] == [3]
    assert fake_run(tree).at_end == run.at_end
    check_equal(tmp_path / "run", whole.folder)


def test_a_stop_in_the_last_evaluation_is_made_up_for_by_a_start_that_trains_nothing(whole, tmp_path):
    tree = whole.tree_in(tmp_path / "run")
    assert stopped_run(tree, 9, "evaluation").code == EXIT_REQUEUE
    again = fake_run(tree)
    assert (again.code, again.started_at) == (EXIT_DONE, 9)
    check_equal(tmp_path / "run", whole.folder)


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    before = read_metrics(tmp_path / "run")
    again = fake_run(whole.tree_in(tmp_path / "run"))
    assert (again.code, again.started_at, again.at_end) == (EXIT_DONE, 9, whole.run.at_end)
    assert read_metrics(tmp_path / "run") == before


def test_without_held_out_data_nothing_is_evaluated(corpus, tmp_path):
    tree = run_tree(corpus, tmp_path / "run")
    del tree["stages"][0]["data"]["validation"]
    assert fake_run(tree).code == EXIT_DONE
    assert values(tmp_path / "run", "validation_loss") == {}


def test_a_run_of_another_meaning_is_refused_and_loses_nothing(whole):
    folder = whole.folder
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match=r"belongs to another run:\n.*seed: 5 -> 6"):
        fake_run(whole.tree_in(whole.folder, seed=6))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_another_meaning_is_free_while_nothing_was_trained(corpus, tmp_path):
    """A first start was refused; its folder serves the corrected run, as the message says."""
    with pytest.raises(DataError, match=r"have 300 tokens in their vocabulary, model.vocab_size = 100"):
        fake_run(run_tree(corpus, tmp_path / "run", model={"vocab_size": 100}))
    assert fake_run(run_tree(corpus, tmp_path / "run")).code == EXIT_DONE


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(whole, tmp_path):
    """Whatever it saves from now on: `checkpoint.every_steps` may have changed since."""
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = read_metrics(tmp_path / "run")
    for every_steps in (3, 100, None):
        again = whole.tree_in(tmp_path / "run", checkpoint={"every_steps": every_steps})
        with pytest.raises(CheckpointError, match=r"has trained 9 steps and saved step 9: its checkpoints are gone"):
            fake_run(again)
    assert read_metrics(tmp_path / "run") == before


class Killed(BaseException):
    """Ends a run without its last words."""


def die_in_step_6(trainer: Any) -> None:
    step = trainer.pipeline.engine.step

    def step_or_die(*arguments: Any) -> float:
        if trainer.state.step == 5:
            raise Killed
        return step(*arguments)

    trainer.pipeline.engine.step = step_or_die


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(whole, tmp_path):
    """Also where it is to save much more often than it was: it has never saved, so nothing of it is gone."""
    tree = whole.tree_in(tmp_path / "run", checkpoint={"every_steps": None})
    with pytest.raises(Killed):
        fake_run(tree, die_in_step_6)
    assert [*values(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5]
    again = fake_run(whole.tree_in(tmp_path / "run", checkpoint={"every_steps": 1}))
    assert (again.code, again.started_at, again.at_end) == (EXIT_DONE, 0, whole.run.at_end)
    check_equal(tmp_path / "run", whole.folder)


def test_a_run_that_died_goes_back_to_its_checkpoint_and_writes_each_step_once(whole, tmp_path):
    tree = whole.tree_in(tmp_path / "run", checkpoint={"asynchronous": False})
    with pytest.raises(Killed):
        fake_run(tree, die_in_step_6)
    again = fake_run(tree)
    assert (again.started_at, again.at_end, again.state) == (3, whole.run.at_end, whole.run.state)
    check_equal(tmp_path / "run", whole.folder)
