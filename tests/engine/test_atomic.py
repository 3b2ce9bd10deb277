"""A file is there whole or as it was, and what killed writers leave is removed, never what living ones write."""

import os
import signal
from pathlib import Path

import pytest

from engine.atomic import replacing, sweep, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while_writing(path: Path) -> None:
    """A process that dies of SIGKILL with half of its file written."""
    pid = os.fork()
    if pid == 0:
        with replacing(path) as file:
            file.write(b"ha")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_content_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "één")
    assert path.read_bytes() == "één".encode()
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == "één".encode(), "the old one is there until the block ends"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_content_and_name_are_on_the_disk_in_that_order(tmp_path, monkeypatch):
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(handle: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def replace(partial: Path, target: Path) -> Path:
        done.append("replace")
        return real_replace(partial, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "file", "content")
    assert done[0].endswith(".partial")
    assert done[1:] == ["replace", str(tmp_path)]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "file[1]"  # brackets mean something in a pattern
    write_atomically(path, "old")
    killed_while_writing(path)
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2
    write_atomically(tmp_path / "other", "another file's leftovers are not touched")
    assert len(names(tmp_path)) == 3
    write_atomically(path, "new")
    assert names(tmp_path) == ["file[1]", "other"]
    assert not sweep(path)


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"slow")
        assert not sweep(path)
        write_in_another_process(path, "fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert names(tmp_path) == ["file"]


def write_in_another_process(path: Path, content: str) -> None:
    pid = os.fork()
    if pid == 0:
        write_atomically(path, content)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "file", "x")
