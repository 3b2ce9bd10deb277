"""Signals that ask a run to save and stop: they set a flag, and the ranks agree on it at the end of a step.

Launchers and clusters deliver a signal more than once, so those within five seconds of the first count as one; a
later one ends the process at once. Python runs a signal handler between two bytecodes of the main
thread, which may wait inside torch for an hour (for the other ranks, in a collective). So handlers do nothing here: the
interpreter's own handler, which is C, writes the signal's number into a pipe at once, and a thread reads it there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType

from engine import output
from engine.errors import EXIT_FAILURE, EXIT_REQUEUE, PalimpsestError
from engine.logs import logger

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 5.0
_END = b"\0"
"""Byte that tells the thread to end; no signal has this number."""

_log = logger(__name__)


class Stopping(PalimpsestError):
    """A stop was requested of this rank, which cannot finish its step; the run ends at the step before."""

    exit_code = EXIT_REQUEUE


class StopSignals:
    """Catch `STOP` while entered; `stop_requested` is True once one has come. Enter it in the main thread.

    A standard output or error whose reader is gone (`train ... | head`) counts as a signal, as it does elsewhere
    (SIGPIPE). A SIGHUP that is ignored when the process starts stays ignored: that is what nohup means.
    """

    def __init__(self) -> None:
        self._asked = False
        self._first_seconds: float | None = None

    @property
    def stop_requested(self) -> bool:
        if not self._asked and output.reader_is_gone():
            self._asked = True
            _log.warning("nobody reads the output any more: saving at the end of this step, then stopping")
        return self._asked

    def __enter__(self) -> StopSignals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # as `set_wakeup_fd` wants it
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        caught = [number for number in STOP if not (number == signal.SIGHUP and _is_ignored(number))]
        # The interpreter writes to the pipe only for signals that have a handler in Python.
        self._before = {number: signal.signal(number, self._on_signal) for number in caught}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        # before the pipe is closed: its descriptor may be another file's the moment after
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._write_end, _END)
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def ignore_from_now_on(self) -> None:
        """Ignore `STOP` until the process has ended, also after the `with` block.

        Call it once a run has saved because it was told to: the same signal often comes again while the interpreter
        ends, which takes a second with torch, and would turn the exit code into that of a killed process.
        """
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Set the flag where the main thread is free to; the thread does the counting: it knows when a signal came."""
        self._asked = True

    def _watch(self) -> None:
        while (number := os.read(self._read_end, 1)) != _END:
            if number[0] in STOP:
                self._count(signal.Signals(number[0]))

    def _count(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_seconds is None:
            self._asked, self._first_seconds = True, now
            # in a thread of its own: the main thread may hold the lock of the logs while it waits
            words = f"{number.name}: saving at the end of this step, then stopping; once more ends this rank at once"
            threading.Thread(target=_log.warning, args=(words,), daemon=True).start()
        elif now - self._first_seconds > SAME_SIGNAL_SECONDS:
            _say(f"second {number.name}: ending at once\n")
            # not sys.exit: this is not the main thread, which may never come back from a collective
            os._exit(EXIT_FAILURE)


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


def _say(text: str) -> None:
    """Write to standard error without a lock, and only if that does not block: the main thread may hold both up."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())
