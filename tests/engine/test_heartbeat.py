"""Signs of life, written by one process and read by another."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.heartbeat import PHASES, VARIABLE, Beat, Heartbeat, given_folder, read


def test_what_is_written_is_read(tmp_path: Path) -> None:
    heart = Heartbeat(given_folder({VARIABLE: str(tmp_path)}), 3)
    assert read(tmp_path, 3) is None, "a rank that has not begun gives no sign of life"
    for number, phase in enumerate(PHASES, start=1):
        before = time.monotonic()
        heart.beat(number * 10, phase)
        beat = read(tmp_path, 3)
        assert beat is not None
        assert (beat.count, beat.step, beat.phase) == (number, number * 10, phase)
        assert before <= beat.seconds <= time.monotonic()
    assert read(tmp_path, 4) is None


def test_another_process_reads_the_same_clock(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from engine.heartbeat import Heartbeat, given_folder
Heartbeat(Path({str(tmp_path)!r}), 0).beat(5, "save")
"""
    before = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    beat = read(tmp_path, 0)
    assert beat is not None
    assert before < beat.seconds < time.monotonic()


@pytest.mark.parametrize("environ", [{}, {VARIABLE: ""}, {VARIABLE: "/no/such/folder"}])
def test_without_a_supervisor_nothing_is_written(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is opened, neither here nor anywhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: pytest.fail(f"{path} is written"))
    monkeypatch.setattr(Path, "open", lambda path, *mode: pytest.fail(f"{path} is opened"))
    heart = Heartbeat(given_folder(environ), 0)
    heart.beat(1, "data")
    assert not list(tmp_path.iterdir())
    assert not Path("/no/such/folder").exists()


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("load", "while the run starts (load)"),
        ("loss", "in step 8 (loss)"),
        ("save", "after step 7 (save)"),
    ],
)
def test_where_a_rank_is(phase, words: str) -> None:
    assert Beat(1, 7, phase, 0.0).where == words
