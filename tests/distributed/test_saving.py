"""A run that saves beside its training: bitwise the run that waits, and one whose write fails says so on every rank."""

import errno
from functools import partial
from pathlib import Path

import pytest

from engine.checkpoint.folder import committed, step_of
from engine.checkpoint.verify import verify
from engine.errors import EXIT_DONE
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.runs import run_tree, train_rank, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def fail_on_rank(trainer, global_rank: int, file_number: int) -> None:
    """This rank's file of that number, counted from 0, meets a full disk."""
    from engine.checkpoint import container

    real, written = container.write, []

    def write(path, *arguments):
        written.append(path)
        if len(written) == file_number + 1:
            with container.disk_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments)

    if trainer.groups.global_rank == global_rank:
        container.write = write


def settle_at_each_step(trainer) -> None:
    """Lets the write of a save end before the step after it, so that a failure has to be told at that step."""
    real = trainer.checkpoints.save_flags

    def signals():
        flight = trainer.checkpoints._saver._flight
        if flight is not None and not flight.writing.done:
            flight.writing._ended.wait()
        return real()

    trainer.checkpoints.save_flags = signals


def prepare(trainer, file_number: int) -> None:
    fail_on_rank(trainer, 1, file_number)
    settle_at_each_step(trainer)


def checkpoints(folder: Path) -> list[int]:
    found = committed(folder / "checkpoints")
    assert [verify(path) for path in found] == [[]] * len(found)
    return [step_of(path) for path in found]


def test_a_failed_write_ends_the_run_at_the_next_step_on_every_rank(corpus, tmp_path):
    tree = run_tree(corpus, tmp_path / "run", parallel={"zero_stage": 1, "data": 2})
    with pytest.raises(RankFailed, match=r"rank 1: no space left for .*step-00000006.*stage-00-data-0001"):
        run_ranks(2, train_rank, tree, partial(prepare, file_number=1))
    assert checkpoints(tmp_path / "run") == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))
    assert '"step": 7' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"step": 8' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_by_choice_the_run_goes_on_without(corpus, tmp_path):
    tree = run_tree(
        corpus,
        tmp_path / "run",
        parallel={"zero_stage": 3, "pipe": 2},
        checkpoint={"on_failure": "continue", "every_steps": 3, "keep_last": 1, "keep_best": 1},
    )
    ranks = run_ranks(2, train_rank, tree, partial(prepare, file_number=1))
    assert {rank["code"] for rank in ranks} == {EXIT_DONE}
    kept = checkpoints(tmp_path / "run")
    assert kept[0] == 9, "the last one was saved"
    assert 6 not in kept
    waited = run_tree(
        corpus,
        tmp_path / "waited",
        parallel={"zero_stage": 3, "pipe": 2},
        checkpoint={"asynchronous": False, "every_steps": 3, "keep_last": 1},
    )
    assert run_ranks(2, train_rank, waited)[0]["at_end"] == ranks[0]["at_end"]
    assert checkpoints(tmp_path / "waited") == [9]


def test_a_last_checkpoint_that_fails_is_a_failed_run_whatever_the_choice(corpus, tmp_path):
    tree = run_tree(corpus, tmp_path / "run", parallel={"data": 2}, checkpoint={"on_failure": "continue"})
    with pytest.raises(RankFailed, match=r"rank 1: no space left for .*step-00000009"):
        run_ranks(2, train_rank, tree, partial(prepare, file_number=2))
    assert checkpoints(tmp_path / "run") == [6, 3]
