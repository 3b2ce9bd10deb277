"""The lock of a run folder between real processes."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.place import RankPlace
from engine.errors import EnvironmentProblem
from engine.train.lock import FILE, FolderLock

REPOSITORY = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from engine.config.place import RankPlace
from engine.train.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take(RankPlace(job="theirs", attempt=2))
print("held", flush=True)
input()
lock.release()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_and_its_user_named(holder, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        FolderLock(tmp_path / "run").take(RankPlace(job="ours"))
    assert f"is in use: process {holder.pid} on " in caught.value.wrong
    assert caught.value.wrong.endswith(", job theirs")
    assert f"kill {holder.pid} on that host" in caught.value.remedy
    assert json.loads((tmp_path / "run" / FILE).read_text())["job"] == "theirs", "the refused one has changed nothing"


@pytest.mark.parametrize(("attempt", "let_in"), [(1, False), (2, False), (3, True)])
def test_a_newer_attempt_of_the_same_job_is_let_in(holder, tmp_path: Path, attempt: int, let_in: bool) -> None:
    lock = FolderLock(tmp_path / "run")
    if let_in:
        lock.take(RankPlace(job="theirs", attempt=attempt))
        return
    with pytest.raises(EnvironmentProblem):
        lock.take(RankPlace(job="theirs", attempt=attempt))


def test_a_killed_holder_holds_nothing(holder, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    FolderLock(tmp_path / "run").take(RankPlace(job="ours"))
    assert json.loads((tmp_path / "run" / FILE).read_text())["job"] == "ours"


def test_after_the_end_nobody_is_named(holder, tmp_path: Path) -> None:
    holder.communicate("\n")
    assert (tmp_path / "run" / FILE).read_text() == ""
    lock = FolderLock(tmp_path / "run")
    lock.take(RankPlace())
    lock.release()
    lock.release()
    assert (tmp_path / "run" / FILE).read_text() == ""


def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    FolderLock(tmp_path / "run").take(RankPlace())
