"""Signals lead to a committed checkpoint and the outcome 85, whatever the run is doing and whoever started it.

Within the trainer one run is stopped while it saves, evaluates and waits for data, in turn, by a real signal to one
of its ranks; put together, the parts are the run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import outcome
from engine.checkpoint.folder import step_path
from engine.errors import EXIT_DONE, EXIT_REQUEUE
from engine.train.metrics import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus

REPOSITORY = Path(__file__).parents[2]
WAIT_SECONDS = 200
"""Upper bound of every wait; nothing waits that long unless the test fails."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def while_saving(trainer: Any) -> None:
    """The writers of step 3's checkpoint wait until the signal, which comes in step 4, has been seen."""
    from engine.checkpoint import container

    write, train = container.write, trainer.pipeline.train

    def slow(*arguments: Any) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while trainer.state.step < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(*arguments)

    def train_and_signal(*arguments: Any) -> Any:
        if trainer.state.step == 3 and trainer.groups.global_rank == 1:
            assert trainer.checkpoints._saver.in_flight == 3
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)  # so soon after the first it is part of it
        return train(*arguments)

    container.write = slow
    trainer.pipeline.train = train_and_signal
    trainer.requests.signals.__enter__()


def while_evaluating(trainer: Any) -> None:
    """In the first of several parts of the evaluation after step 6."""
    evaluate, parts = trainer.pipeline.evaluate, []

    def evaluate_and_signal(inputs: Any) -> Any:
        if trainer.state.step == 6 and trainer.groups.global_rank == 1:
            parts.append(len(inputs))
            assert len(parts) == 1, "the evaluation went on after the signal"
            assert trainer.feed.num_validation_chunks(trainer.feed.validation) > 1
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(inputs)

    trainer.pipeline.evaluate = evaluate_and_signal
    trainer.requests.signals.__enter__()


def while_waiting_for_data(trainer: Any) -> None:
    """Rank 1's data never comes in step 8; rank 0 has its own."""
    start = trainer.feed.start

    def start_and_starve() -> None:
        start()
        wait = trainer.feed._prefetcher.wait

        def starved(seconds: float) -> bool:
            if trainer.state.step < 7 or trainer.groups.global_rank != 1:
                return wait(seconds)
            os.kill(os.getpid(), signal.SIGTERM)
            return False

        trainer.feed._prefetcher.wait = starved

    trainer.feed.start = start_and_starve
    trainer.requests.signals.__enter__()


STOPS: list[tuple[Callable[[Any], None], int]] = [
    (while_saving, 4),
    (while_evaluating, 6),
    (while_waiting_for_data, 7),
]


def test_a_run_stopped_in_every_place_is_the_run_that_nobody_stopped(corpus, tmp_path):
    def tree(folder: Path) -> dict[str, Any]:
        parallel = {"zero_stage": 1, "data": 2, "micro_batch_size": 1}
        return run_tree(corpus, folder, parallel=parallel, evaluation={"max_samples": None})

    stopped, whole = tree(tmp_path / "stopped"), tree(tmp_path / "whole")
    expected = run_ranks(2, train_rank, whole)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    for prepare, step in STOPS:
        ranks = run_ranks(2, train_rank, stopped, prepare)
        assert [(rank["code"], rank["state"].step) for rank in ranks] == [(EXIT_REQUEUE, step)] * 2, prepare.__name__
        assert step_path(checkpoints, step).is_dir(), prepare.__name__
        evaluated = [record["step"] for record in read_metrics(tmp_path / "stopped") if "validation_loss" in record]
        assert evaluated == [at for at in (3, 6) if at < step or (at == 6 and step == 7)]
    assert step_path(checkpoints, 3).is_dir(), "the save that was in flight was finished, too"

    ranks = run_ranks(2, train_rank, stopped)
    assert [rank["code"] for rank in ranks] == [EXIT_DONE] * 2
    assert [rank["at_end"] for rank in ranks] == [rank["at_end"] for rank in expected]
    for key in ("loss", "gradient_norm", "validation_loss", "samples"):
        found = [[(record["step"], record[key]) for record in read_metrics(tmp_path / run) if key in record]
                 for run in ("stopped", "whole")]  # fmt: skip
        assert found[0] == found[1], key


def endless_run(corpus: Path, folder: Path) -> Path:
    """The file of a run that goes on until it is stopped, and saves only then."""
    stage = run_tree(corpus, folder)["stages"][0] | {"duration": {"steps": 100_000}}
    tree = run_tree(
        corpus, folder / "run", stages=[stage], evaluation={"every_steps": None}, checkpoint={"every_steps": None},
        checks=False,
    )  # fmt: skip
    path = folder / "RUN.yaml"
    path.write_text(json.dumps(tree))
    return path


def command(*arguments: str, stdout: int) -> subprocess.Popen[str]:
    foreign = ("SLURM_", "OMPI_", "PMI_", "PALIMPSEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "engine.cli", *arguments], cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
        stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_saved(run: Path) -> int:
    """The step that the outcome names, at which there is a checkpoint."""
    ended = outcome.read(run)
    assert ended is not None
    assert ended.code == EXIT_REQUEUE
    assert step_path(run / "checkpoints", ended.step).is_dir()
    return ended.step


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize(
    ("launcher", "signals"),
    [
        ("local", [signal.SIGHUP]),
        ("deepspeed", [signal.SIGUSR1, signal.SIGUSR1]),
        pytest.param("torchrun", [signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.matrix),
    ],
)
def test_a_signal_to_the_launch_is_a_checkpoint_and_85(launcher, signals, corpus, tmp_path):
    """Its standard output is a pipe that nobody reads, as in `launch ... | tee` after Ctrl-C."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    path = endless_run(corpus, tmp_path)
    launch = command("launch", str(path), "--launcher", launcher, "--processes", "2", stdout=write_end)
    os.close(write_end)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not read_metrics(tmp_path / "run") and launch.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in signals:
            launch.send_signal(number)
            time.sleep(0.3)  # part of the case: clusters deliver a signal twice, not at the same moment
        _, stderr = launch.communicate(timeout=WAIT_SECONDS)
    finally:
        launch.kill()
    assert launch.returncode == EXIT_REQUEUE, stderr
    step = assert_saved(tmp_path / "run")
    assert f"saved at step {step} and wants to be started again (exit code 85)" in stderr


def test_a_pipe_that_breaks_is_a_checkpoint_and_85(corpus, tmp_path):
    """`train ... | head`, under nobody's watch."""
    train = command("train", str(endless_run(corpus, tmp_path)), stdout=subprocess.PIPE)
    try:
        assert train.stdout is not None
        assert any(line.startswith("step      1/") for line in train.stdout)
        train.stdout.close()
        _, stderr = train.communicate(timeout=WAIT_SECONDS)
    finally:
        train.kill()
    assert train.returncode == EXIT_REQUEUE, stderr
    assert_saved(tmp_path / "run")
    assert "nobody reads the output any more: saving at the end of this step" in stderr
