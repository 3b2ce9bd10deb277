"""Requests to stop and to save: by switch file, by the job's time limit and by the clock, obeyed after the step."""

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import CHECKPOINTS, committed, step_of
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.switch_files import SAVE, STOP
from engine.train.requests import Requests
from engine.train.time_limit import job_seconds_left
from tests.distributed.runs import run_config, run_tree
from tests.engine.train.fake import StopAfter, fake_run


@pytest.fixture
def tree(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of nine steps with a checkpoint at the end alone."""
    return run_tree(corpus, tmp_path / "run") | {"checkpoint": {"keep_last": 99}}


def steps_saved(tree: dict[str, Any]) -> list[int]:
    return sorted(step_of(path) for path in committed(run_config(tree).folder / CHECKPOINTS))


def touching(name: str, step: int) -> Any:
    """Return a `prepare` that makes a switch file while step `step` + 1 is under way."""

    def prepare(trainer: Any) -> None:
        beat = trainer.heart.beat

        def watch(done: int, phase: str) -> None:
            beat(done, phase)
            if (done, phase) == (step, "forward and backward"):
                (trainer.config.folder / name).touch()

        trainer.heart.beat = watch

    return prepare


def test_stop_is_obeyed_after_the_step_and_the_run_goes_on_without_it(tree: dict[str, Any]) -> None:
    whole = fake_run(run_tree_of(tree, "whole"))
    stopped = fake_run(tree, touching(STOP, 2))
    assert (stopped.code, stopped.state.step) == (EXIT_REQUEUE, 3)
    assert steps_saved(tree) == [3]
    (run_config(tree).folder / STOP).unlink()
    resumed = fake_run(tree)
    assert (resumed.code, resumed.started_at, resumed.at_end) == (EXIT_DONE, 3, whole.at_end)


def test_save_is_obeyed_once_and_the_file_is_removed(tree: dict[str, Any]) -> None:
    done = fake_run(tree, touching(SAVE, 1))
    assert done.code == EXIT_DONE
    assert steps_saved(tree) == [2, done.state.step]
    assert not (run_config(tree).folder / SAVE).exists()


def test_a_checkpoint_every_minute(tree: dict[str, Any]) -> None:
    """A step takes 40 s, and the ranks agree on the clock in the step: 80 s after the start, or after a checkpoint."""
    tree["checkpoint"] |= {"every_minutes": 1.0}

    def prepare(trainer: Any) -> None:
        trainer.requests = Requests(trainer.config, StopAfter(99), True, lambda: 40.0 * trainer.state.step)  # type: ignore[arg-type]

    assert fake_run(tree, prepare).state.step == 9
    assert steps_saved(tree) == [3, 6, 9]


def test_the_run_leaves_before_the_jobs_end(tree: dict[str, Any]) -> None:
    config = run_config(tree | {"launch": {"stop_before_seconds": 30.0}})
    seconds = [1000.0]
    asked = Requests(config, StopAfter(99), True, lambda: seconds[0], lambda: 100.0)  # type: ignore[arg-type]
    seconds[0] = 1069.9
    assert not asked.stop_requested
    seconds[0] = 1070.0
    assert asked.stop_requested


def test_other_ranks_look_at_no_clock_and_no_file(tree: dict[str, Any]) -> None:
    config = run_config(tree | {"launch": {"stop_before_seconds": 30.0}})
    config.folder.mkdir(parents=True)
    for name in (SAVE, STOP):
        (config.folder / name).touch()
    other = Requests(config, StopAfter(99), False, lambda: 1e9, lambda: 0.0)  # type: ignore[arg-type]
    assert not other.stop_requested
    assert not other.save_requested


def test_a_job_without_a_limit_is_told(tree: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(tree | {"launch": {"stop_before_seconds": 30.0}})
    asked = Requests(config, StopAfter(99), True, seconds_left=lambda: None)  # type: ignore[arg-type]
    assert not asked.stop_requested
    assert "no time limit" in caplog.text


@pytest.mark.parametrize(
    ("environ", "left", "seconds"),
    [
        ({}, "", None),
        ({"SLURM_JOB_END_TIME": "1100"}, "", 100.0),
        ({"SLURM_JOB_END_TIME": "0", "SLURM_JOB_ID": "7"}, "9:59\n", 599.0),
        ({"SLURM_JOB_ID": "7"}, "2:09:59\n", 7799.0),
        ({"SLURM_JOB_ID": "7"}, "3-02:09:59\n", 266999.0),
        ({"SLURM_JOB_ID": "7"}, "UNLIMITED\n", None),
        ({"SLURM_JOB_ID": "7"}, "INVALID\n", None),
        ({"SLURM_JOB_ID": "7; true"}, "1:00\n", None),
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "1:00\n", 60.0),
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": ""}, "1:00\n", 60.0),
        ({"SLURM_ARRAY_JOB_ID": "7; true", "SLURM_ARRAY_TASK_ID": "3"}, "1:00\n", None),
    ],
)
def test_the_jobs_time_left(environ: dict[str, str], left: str, seconds: float | None) -> None:
    assert job_seconds_left(environ, lambda: 1000.0, lambda job: left) == seconds


def run_tree_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the same run in another folder beside it."""
    return tree | {"folder": str(Path(tree["folder"]).parent / name)}
