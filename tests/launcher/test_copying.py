"""Output that cannot be written: the process that prints never waits for it, and the other place has all of it."""

from __future__ import annotations

import io
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import copying
from launcher.copying import Copier

WAIT_SECONDS = 60.0
PRINTS = "for number in range(40_000): print('line', number)"
"""Far more than a pipe holds."""
ALL = b"".join(b"line %d\n" % number for number in range(40_000))


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    monkeypatch.setattr(logging.getLogger("palimpsest"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def copy(path: Path, code: str = PRINTS, prepare: Callable[[], None] = lambda: None) -> int:
    """The exit code of a process whose output is copied to `path` and to `sys.stdout`."""
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    prepare()
    copier = Copier(process.stdout, path.open("ab", buffering=0), path)
    try:
        return process.wait(WAIT_SECONDS)  # for ever, if nobody emptied its pipe
    finally:
        process.kill()
        copier.end(WAIT_SECONDS)


def stdout_of(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    stream = os.fdopen(descriptor, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_both_have_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str], told: Callable[[], list[str]]) -> None:
    assert copy(tmp_path / "log") == 0
    assert (tmp_path / "log").read_bytes() == ALL
    assert capfd.readouterr().out.encode() == ALL
    assert told() == []


@pytest.mark.parametrize("device", ["pipe", "/dev/full"])
def test_a_terminal_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]], device: str
) -> None:
    if device == "pipe":  # launch ... | head
        read_end, write_end = os.pipe()
        os.close(read_end)
    else:
        write_end = os.open(device, os.O_WRONLY)
    with stdout_of(write_end, monkeypatch):
        assert copy(tmp_path / "log") == 0
        monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == ALL
    reason = "Broken pipe" if device == "pipe" else "No space left on device"
    assert told() == [f"the terminal cannot be written ({reason}): what the ranks print is dropped there"]


def test_a_terminal_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    """It is stopped (Ctrl-S), and more is printed than is kept for it."""
    monkeypatch.setattr(copying, "MOST_WAITING_BYTES", 1000)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    while True:
        try:
            os.write(write_end, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write_end, True)
    process = subprocess.Popen([sys.executable, "-S", "-c", PRINTS], stdout=subprocess.PIPE)
    with stdout_of(write_end, monkeypatch):
        copier = Copier(process.stdout, (tmp_path / "log").open("ab", buffering=0), tmp_path / "log")
        assert process.wait(WAIT_SECONDS) == 0
        os.close(read_end)
        copier.end(WAIT_SECONDS)
    assert (tmp_path / "log").read_bytes() == ALL
    assert "the terminal cannot be written (it does not take what is written to it)" in told()[0]


def test_a_closed_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert copy(tmp_path / "log") == 0
    assert (tmp_path / "log").read_bytes() == ALL


def test_a_log_that_cannot_be_written_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    """The disk is full at first; what comes when it is not is in the log again."""
    path, (soft, hard) = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"before\n")
    os.mkfifo(tmp_path / "go")
    monkeypatch.setattr(sys, "stdout", None)  # pytest's own file would be full, too
    code = f"import sys\n{PRINTS}\nsys.stdout.flush()\nopen(sys.argv[1]).read()\nprint('later')"
    process = subprocess.Popen([sys.executable, "-S", "-c", code, str(tmp_path / "go")], stdout=subprocess.PIPE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        copier = Copier(process.stdout, path.open("ab", buffering=0), path)
        with (tmp_path / "go").open("w"):  # opens when the process has printed its lines, and opens it
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert process.wait(WAIT_SECONDS) == 0
        copier.end(WAIT_SECONDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        process.kill()
    assert path.read_bytes().startswith(b"before\nli")
    assert path.read_bytes().endswith(b"later\n")
    assert told() == [f"{path} cannot be written (File too large): what the ranks print is dropped there"]
