"""The run folder names the hosts that hold the newest generation, and a start without it says what is lost."""

import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.node_memory import hosts
from engine.checkpoint.node_memory.hosts import Held, lost_words
from tests.distributed.runs import run_tree
from tests.engine.train.fake import StopAfter, fake_run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    return caplog


def killed_after(step: int) -> Any:
    """Return a `prepare` that ends the run by an error once a step is done, with its generation in memory."""

    def prepare(trainer: Any) -> None:
        train = trainer.pipeline.train

        def settle_and_train(*arguments: Any) -> Any:
            trainer.checkpoints.settle()
            if trainer.state.step == step:
                raise KeyboardInterrupt
            return train(*arguments)

        trainer.pipeline.train = settle_and_train

    return prepare


def test_a_start_on_other_hosts_says_what_is_lost(corpus: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    run = tmp_path / "run"
    tree = run_tree(corpus, run, checkpoint={"every_steps": 3, "memory": {"every_steps": 1, "folder": str(memory)}})
    with pytest.raises(KeyboardInterrupt):
        fake_run(tree, killed_after(5))
    assert hosts.read(run) == Held(5, "job", (socket.gethostname(),))
    # the node has lost power: nothing of its memory is left, and another one takes its place
    shutil.rmtree(memory)
    memory.mkdir()
    hosts.note(run, Held(5, "job", ("n7",)))
    resumed = fake_run(tree, attempt=1)
    assert (resumed.started_at, resumed.state.step) == (3, 9)
    assert (
        "step 5 was in the memory of n7, of which n7 is not part of this start: going on from step 3, so 2" in said.text
    )


def test_nothing_is_lost_where_the_memory_is_found(
    corpus: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    run = tmp_path / "run"
    tree = run_tree(corpus, run, checkpoint={"every_steps": 3, "memory": {"every_steps": 1, "folder": str(memory)}})
    with pytest.raises(KeyboardInterrupt):
        fake_run(tree, killed_after(5))
    assert fake_run(tree, attempt=1, signals=StopAfter(99)).started_at == 5
    assert "was in the memory of" not in said.text


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (("n1", "n2"), "n1, n2, and is lost: going on from step 4, so 6 steps"),
        (("n1", "n3"), "n1, n2, of which n2 is not part of this start: going on"),
        (("n3",), "n1, n2, of which n1, n2 are not part of this start: going on"),
    ],
)
def test_hosts_that_are_gone_are_named(there: tuple[str, ...], words: str) -> None:
    assert words in lost_words(Held(10, "job", ("n1", "n2")), 4, there)


def test_a_record_that_cannot_be_read_or_written_harms_nothing(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    (tmp_path / hosts.FILE).write_text("{")
    assert hosts.read(tmp_path) is None
    hosts.note(tmp_path / "none", Held(1, "job", ()))
    assert "cannot be written" in said.text
    hosts.forget(tmp_path)
    hosts.forget(tmp_path)
    assert not (tmp_path / hosts.FILE).exists()
