"""Who owns a run folder, between real processes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import outcome
from engine.errors import EnvironmentProblem
from engine.outcome import Outcome
from engine.run_folder import FILE, RunFolder, Start

REPOSITORY = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
job, attempt, mark, supervisor = sys.argv[2:]
folder = RunFolder(Path(sys.argv[1]), Start(job, int(attempt), mark))
folder.take(supervisor=bool(supervisor))
print("held", flush=True)
for line in sys.stdin:
    folder.note(Outcome(job, int(attempt), 0, int(line)))
    print("said", flush=True)
folder.release()
"""
Hold = Callable[..., subprocess.Popen[str]]
THEIRS = Start("theirs", 2, "step 0, node1:15001")


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts other processes that hold the folder until their input ends; a number makes one say that it is done."""
    processes: list[subprocess.Popen[str]] = []

    def start(which: Start = THEIRS, supervisor: bool = False) -> subprocess.Popen[str]:
        given = [which.job, str(which.attempt), which.mark, "yes" if supervisor else ""]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run"), *given],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def say_done(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "said\n"


def failure(start: Start, rank: int = 1) -> Outcome:
    return Outcome(start.job, start.attempt, 1, 0, rank, "failed")


def named(run: Path) -> str:
    return json.loads((run / FILE).read_text())["job"]


def test_a_folder_in_use_is_refused_and_its_user_named(hold: Hold, run: Path) -> None:
    holder = hold()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused = RunFolder(run, Start("ours", 0, "elsewhere"))
    with pytest.raises(EnvironmentProblem) as caught:
        refused.take()
    assert f"is in use: process {holder.pid} on " in caught.value.wrong
    assert caught.value.wrong.endswith(", job theirs")
    assert f"kill {holder.pid} on that host" in caught.value.remedy
    refused.note_failure(failure(refused.start, rank=0))
    refused.note(failure(refused.start, rank=0))
    refused.release()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before, "the refused one has changed nothing"


@pytest.mark.parametrize(("attempt", "let_in"), [(1, False), (2, False), (3, True)])
def test_a_newer_attempt_of_the_same_job_is_let_in(hold: Hold, run: Path, attempt: int, let_in: bool) -> None:
    hold()
    folder = RunFolder(run, Start("theirs", attempt, THEIRS.mark))
    if let_in:
        folder.take()
        return
    with pytest.raises(EnvironmentProblem):
        folder.take()


def test_an_attempt_that_was_followed_says_nothing_any_more(hold: Hold, run: Path) -> None:
    """It may come back from a node that nobody reached."""
    older = hold()
    newer = hold(Start("theirs", 3, THEIRS.mark))
    say_done(older, 7)
    assert outcome.read(run) is None
    say_done(newer, 8)
    say_done(older, 9)
    assert outcome.read(run) == Outcome("theirs", 3, 0, 8)
    older.communicate()
    assert named(run) == "theirs", "its end leaves the newer one's name"


def test_a_third_start_is_kept_out_by_whoever_of_two_attempts_lives(hold: Hold, run: Path) -> None:
    older = hold()
    hold(Start("theirs", 3, THEIRS.mark))
    older.kill()
    older.wait()
    with pytest.raises(EnvironmentProblem):
        RunFolder(run, Start("ours", 0)).take()


def test_a_supervisor_and_its_rank_hold_the_folder_together(hold: Hold, run: Path) -> None:
    """The survivors of a killed supervisor keep others out; only ranks of the same job join them."""
    launched = Start("launched", 0)
    supervisor = hold(launched, supervisor=True)
    with pytest.raises(EnvironmentProblem):
        RunFolder(run, Start("ours", 0, "elsewhere")).take()
    rank = hold(launched)
    with pytest.raises(EnvironmentProblem):
        RunFolder(run, launched).take()  # a second rank 0 of that start
    supervisor.kill()
    supervisor.wait()
    with pytest.raises(EnvironmentProblem):
        RunFolder(run, Start("ours", 0, "elsewhere")).take()
    rank.kill()
    rank.wait()
    with RunFolder(run, Start("ours", 0, "elsewhere")) as folder:
        folder.take()
        assert named(run) == "ours"


def test_a_supervisor_keeps_the_folder_from_attempt_to_attempt(hold: Hold, run: Path) -> None:
    with RunFolder(run, Start("launched", 0)) as folder:
        folder.take(supervisor=True)
        folder.take(Start("launched", 1), supervisor=True)
        rank = hold(Start("launched", 1))
        rank.communicate()
        assert folder.is_ours()
        folder.note(Outcome("launched", 1, 1, 3))
    assert outcome.read(run) == Outcome("launched", 1, 1, 3)
    assert (run / FILE).read_text() == ""


def test_a_killed_holder_holds_nothing(hold: Hold, run: Path) -> None:
    holder = hold()
    holder.kill()
    holder.wait()
    with RunFolder(run, Start("ours", 0)) as folder:
        folder.take()
        assert named(run) == "ours"


def test_after_the_end_nobody_is_named(hold: Hold, run: Path) -> None:
    hold().communicate()
    assert (run / FILE).read_text() == ""
    folder = RunFolder(run, Start("local", 0, "alone"))
    folder.take()
    folder.release()
    folder.release()
    assert (run / FILE).read_text() == ""


def test_a_file_system_without_locks_is_no_reason_not_to_train(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunFolder(run, THEIRS) as folder:
        folder.take()
        assert folder.is_ours()


class TestOtherRanks:
    """Ranks that have not taken the folder: what they write there, and when they leave."""

    def test_one_of_the_owners_ranks_may_say_that_it_failed_and_the_first_is_heard(self, hold: Hold, run: Path) -> None:
        hold()
        first = failure(THEIRS, rank=1)
        RunFolder(run, THEIRS).note_failure(first)
        RunFolder(run, THEIRS).note_failure(failure(THEIRS, rank=2))
        assert outcome.read(run) == first

    @pytest.mark.parametrize(
        "other",
        [
            Start("theirs", 2, "step 1, node1:15001"),
            Start("theirs", 1, THEIRS.mark),
            Start("other", 2, THEIRS.mark),
        ],
        ids=["another step", "an older attempt", "another job"],
    )
    def test_one_of_another_start_leaves_and_writes_nothing(self, hold: Hold, run: Path, other: Start) -> None:
        hold()
        folder = RunFolder(run, other)
        with pytest.raises(EnvironmentProblem, match="is in use"):
            folder.refuse_other()
        folder.note_failure(failure(other))
        assert outcome.read(run) is None

    def test_one_of_the_owners_or_of_a_newer_attempt_stays(self, hold: Hold, run: Path) -> None:
        hold()
        RunFolder(run, THEIRS).refuse_other()
        RunFolder(run, Start("theirs", 3, "step 0, node2:15001")).refuse_other()

    def test_two_starts_of_one_name_on_one_host_are_told_apart_by_their_parents(self, hold: Hold, run: Path) -> None:
        """As two `deepspeed` commands on its default port: this process started the holder, and is not its parent's
        child."""
        hold()
        stranger = RunFolder(run, THEIRS, parent=os.getppid())
        stranger.note_failure(failure(THEIRS))
        assert outcome.read(run) is None
        sibling = RunFolder(run, THEIRS, parent=os.getpid())
        sibling.note_failure(failure(THEIRS))
        assert outcome.read(run) == failure(THEIRS)

    def test_after_the_meeting_the_parent_does_not_matter(self, hold: Hold, run: Path) -> None:
        hold()
        folder = RunFolder(run, THEIRS, parent=os.getppid())
        folder.met = True
        folder.note_failure(failure(THEIRS))
        assert outcome.read(run) == failure(THEIRS)

    def test_a_folder_that_is_not_there_is_made_for_a_failure(self, run: Path) -> None:
        RunFolder(run, THEIRS).note_failure(failure(THEIRS))
        assert outcome.read(run) == failure(THEIRS)

    def test_an_earlier_starts_word_in_a_free_folder_gives_way(self, hold: Hold, run: Path) -> None:
        earlier = hold()
        say_done(earlier, 100)
        earlier.send_signal(signal.SIGKILL)
        earlier.wait()
        later = Start("later", 0, "")
        RunFolder(run, later).note_failure(failure(later))
        assert outcome.read(run) == failure(later)

    def test_what_cannot_be_written_is_dropped(self, run: Path) -> None:
        run.touch()
        RunFolder(run, THEIRS).note_failure(failure(THEIRS))
