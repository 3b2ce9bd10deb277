"""A step that Slurm refuses is started again; one that has begun, or failed by itself, is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.slurm import step as module
from launcher.slurm.step import Step

REFUSAL = "srun: error: Unable to create step for job 7: Memory required by task is not available"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)


def step(folder: Path, script: str) -> Step:
    """Start a shell in place of srun, which counts its starts in a file."""
    count = f"echo x >> {folder}/starts; started=$(wc -l < {folder}/starts)\n"
    return Step(["bash", "-c", count + script], os.environ, folder / "log")


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


def end(one: Step) -> int:
    deadline = time.monotonic() + 60
    while (code := one.poll()) is None:
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.01)
    return code


def test_a_refused_step_is_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = step(tmp_path, f"[ $started -lt 3 ] && {{ echo '{REFUSAL}' >&2; exit 1; }}; echo begun; exit 4")
    assert end(one) == 4
    assert starts(tmp_path) == 3
    assert (tmp_path / "log").read_text().count("Unable to create step") == 2
    assert caplog.text.count("Memory required by task is not available; trying again for 120 s") == 1


@pytest.mark.parametrize(
    "words",
    [
        "srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)",
        "srun: error: Slurm controller not responding, sleeping and retrying.",
    ],
)
def test_a_step_that_srun_keeps_waiting_for_is_told(
    words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = step(tmp_path, f"echo '{words}' >&2; until [ -e {tmp_path}/free ]; do sleep 0.05; done; exit 4")
    deadline = time.monotonic() + 60
    while not caplog.text:
        assert one.poll() is None
        assert time.monotonic() < deadline, "nothing is told"
    said = words.removeprefix("srun: ").removeprefix("error: ")
    assert f"{said}: Slurm does not start the step yet" in caplog.text
    assert one.poll() is None
    (tmp_path / "free").touch()
    assert end(one) == 4
    assert caplog.text.count("retrying") == 1, "once"


def test_a_step_that_has_begun_is_not_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """srun says that it is retrying where the controller is away, too; and the log lies on a shared file system."""
    one = step(tmp_path, f"until [ -e {tmp_path}/away ]; do sleep 0.05; done; echo '{REFUSAL}, retrying'; exit 1")
    assert one.poll() is None
    one.mark_begun()
    monkeypatch.setattr(one, "_said", lambda: pytest.fail("the log is read"))
    assert one.poll() is None
    (tmp_path / "away").touch()
    assert end(one) == 1
    assert not caplog.text
    assert starts(tmp_path) == 1, "ranks that have begun are not started a second time"


@pytest.mark.parametrize("words", ["srun: error: node2: task 1: Exited with exit code 137", ""])
def test_a_step_that_fails_is_not_started_again(words: str, tmp_path: Path) -> None:
    # What an earlier step has left in the log says nothing about this one.
    (tmp_path / "log").write_text(REFUSAL + "\n")
    assert end(step(tmp_path, f"echo '{words}'; exit 1")) == 1
    assert starts(tmp_path) == 1


def test_a_step_that_is_always_refused_fails_in_the_end(tmp_path: Path) -> None:
    one = step(tmp_path, f"echo '{REFUSAL}'; exit 1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "starts").exists() or starts(tmp_path) < 3:
        assert one.poll() is None
        assert time.monotonic() < deadline, "it is not tried again"
    one._give_up_at = time.monotonic()  # its time is over
    assert end(one) == 1


def test_a_step_is_ended(tmp_path: Path) -> None:
    one = step(tmp_path, "trap '' TERM; sleep 600")
    assert one.poll() is None
    assert not one.wait(0.1)
    assert one.kill() == -9
    assert one.poll() == -9
