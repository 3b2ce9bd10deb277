"""Standard output and error that cannot be written, in processes of their own: a closed pipe, and a full device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WAIT_SECONDS = 60
PROLOGUE = """
import os, sys
from engine import output
def tell(text): os.write(int(sys.argv[1]), text.encode())
"""


def run(
    code: str, *, flags: tuple[str, ...] = (), stdout: int | None = None, stderr: int = subprocess.PIPE
) -> tuple[int, str, str]:
    """Exit code, what the code tells past its output, and standard error where it can be written."""
    read_end, write_end = os.pipe()
    done = subprocess.run(
        [sys.executable, *flags, "-c", PROLOGUE + code, str(write_end)], cwd=REPOSITORY, pass_fds=(write_end,),
        timeout=WAIT_SECONDS, check=False, text=True, stdout=stdout, stderr=stderr,
    )  # fmt: skip
    os.close(write_end)
    with open(read_end) as told:
        return done.returncode, told.read(), done.stderr or ""


@pytest.fixture
def broken():
    """A pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


@pytest.fixture
def full():
    """A device that is full."""
    device = os.open("/dev/full", os.O_WRONLY)
    yield device
    os.close(device)


GOES_ON = """
with output.lenient():
    for number in range(3): print("line", number, flush=number > 0)
    print("left in the buffer")
    tell(f"gone: {output.reader_is_gone()}")
sys.exit(85)
"""


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_program_goes_on_without_a_reader_and_keeps_its_exit_code(broken: int, flags: tuple[str, ...]) -> None:
    code, told, error = run(GOES_ON, flags=flags, stdout=broken)
    assert (code, told) == (85, "gone: True")
    assert error == "standard output cannot be written (Broken pipe): it is dropped\n"


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_full_device_is_no_reader_that_has_gone(full: int, flags: tuple[str, ...]) -> None:
    code, told, error = run(GOES_ON, flags=flags, stdout=full)
    assert (code, told) == (85, "gone: False")
    assert error == "standard output cannot be written (No space left on device): it is dropped\n"


def test_nothing_can_be_written_at_all(full: int) -> None:
    assert run(GOES_ON + "print('x', file=sys.stderr)", stdout=full, stderr=full)[:2] == (85, "gone: False")


def test_logs_and_libraries_write_to_the_same_streams(broken: int) -> None:
    code = """
with output.lenient():
    import logging, warnings
    from engine import logs
    logs.configure()
    logs.logger("x").warning("one")
    warnings.warn("two")
    logging.basicConfig(stream=sys.stdout)
    logging.warning("three")
    tell(f"gone: {output.reader_is_gone()}")
"""
    assert run(code, stdout=broken, stderr=broken)[:2] == (0, "gone: True")


def test_a_stream_that_is_closed_from_the_start() -> None:
    code = "os.close(1)\nos.execv(sys.executable, [sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    inner = PROLOGUE + "with output.lenient():\n    print('x')\n    tell('went on')"
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\n" + code, str(write_end), inner], cwd=REPOSITORY,
        pass_fds=(write_end,), timeout=WAIT_SECONDS, check=False,
    )  # fmt: skip
    os.close(write_end)
    with open(read_end) as told:
        assert (done.returncode, told.read()) == (0, "went on")


def test_what_can_be_written_is() -> None:
    code, _, error = run("with output.lenient():\n    print('kept', file=sys.stderr)\nprint('after', file=sys.stderr)")
    assert (code, error) == (0, "kept\nafter\n")


def test_letters_that_the_locale_has_not_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    read_end, write_end = os.pipe()
    code, told, error = run("with output.lenient(): print('\u91cd l\xe4uft')\ntell('went on')", stdout=write_end)
    os.close(write_end)
    with open(read_end) as shown:
        assert (code, told, error, shown.read()) == (0, "went on", "", "\\u91cd l\\xe4uft\n")
