"""Switch files are seen at the next look, however coarse the file system's clock, and without a look at each file."""

import os
from pathlib import Path

import pytest

from engine.errors import EXIT_USAGE
from engine.switch_files import SAVE, STOP, Stopped, SwitchFiles, refuse_stopped


def test_each_file_is_seen_at_the_next_look(tmp_path: Path) -> None:
    seconds = [0.0]
    files = SwitchFiles(tmp_path, lambda: seconds[0])
    for made in (set(), {SAVE}, {SAVE, STOP}, {STOP}, set()):
        seconds[0] += 100
        for name in (SAVE, STOP):
            (tmp_path / name).touch() if name in made else (tmp_path / name).unlink(missing_ok=True)
        # As a file system whose times are whole seconds, of which none passes twice.
        os.utime(tmp_path, (0, int(seconds[0])))
        assert files.found() == made
        assert files.found() == made


def test_a_file_in_the_same_tick_of_the_file_systems_clock_is_seen(tmp_path: Path) -> None:
    seconds = [0.0]
    files = SwitchFiles(tmp_path, lambda: seconds[0])
    os.utime(tmp_path, (0, 0))
    assert files.found() == set()
    (tmp_path / STOP).touch()
    os.utime(tmp_path, (0, 0))
    seconds[0] = 1.0
    assert files.found() == {STOP}


def test_a_look_is_one_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, stats = [0.0], []
    files = SwitchFiles(tmp_path, lambda: seconds[0])
    files.found()
    seconds[0] = 10.0
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: (stats.append(args), real(*args, **kwargs))[1])
    for _ in range(5):
        files.found()
    assert len(stats) == 5


def test_a_folder_that_is_gone_has_no_files(tmp_path: Path) -> None:
    assert SwitchFiles(tmp_path / "none").found() == set()


def test_a_stopped_run_is_refused_in_words(tmp_path: Path) -> None:
    refuse_stopped(tmp_path)
    (tmp_path / STOP).touch()
    with pytest.raises(Stopped, match="rm ") as caught:
        refuse_stopped(tmp_path)
    assert caught.value.exit_code == EXIT_USAGE
