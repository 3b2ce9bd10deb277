"""Copying of a process's output to its log and to the terminal, which never holds the process up.

A process whose pipe nobody empties stops at 64 KiB of output. So one thread reads, whatever becomes of what it has
read, and a second one writes to the terminal, which may be stopped (Ctrl-S), slow or gone. What cannot be written to
one of the two is dropped there, and said once.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import IO, Any

from engine.logs import logger
from engine.output import write_all

CHUNK_BYTES = 1 << 16
MOST_WAITING_BYTES = 1 << 22
"""Most bytes that wait for a terminal that does not take them; more is dropped."""

_log = logger(__name__)


class Copier:
    """Copier of a pipe to a log and the terminal, until the last process that holds its other end is gone."""

    def __init__(self, pipe: Any, log: IO[bytes], path: Path) -> None:
        """Start copying `pipe`, a buffered reader, to `log`, an unbuffered file at `path`.

        The log is closed when all is copied."""
        self._pipe, self._log, self._path = pipe, log, path
        self._waiting, self._ended = bytearray(), False
        self._changed = threading.Condition()
        self._told: set[str] = set()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._show)]
        for thread in self._threads:
            thread.start()

    def end(self, seconds: float) -> None:
        """Wait until everything is copied, for `seconds` at most per thread."""
        for thread in self._threads:
            thread.join(seconds)

    def _read(self) -> None:
        with self._log:
            # `read1` returns what is there; `read` would wait for a full chunk, and the terminal would lag behind.
            while chunk := self._pipe.read1(CHUNK_BYTES):
                try:
                    # The log first: it is complete even where the terminal takes nothing.
                    write_all(self._log.fileno(), chunk)
                except OSError as error:
                    self._tell(str(self._path), error.strerror or str(error))
                self._hand_over(chunk)
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _hand_over(self, chunk: bytes) -> None:
        with self._changed:
            # Dropped and not waited for: a rank that waits for a terminal would hold up all others in a collective.
            fits = len(self._waiting) + len(chunk) <= MOST_WAITING_BYTES
            if fits:
                self._waiting += chunk
                self._changed.notify()
        if not fits:
            self._tell("the terminal", "it does not take what is written to it")

    def _show(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                # Taken under the lock and written outside of it: a stopped terminal (Ctrl-S) must not stop the reader.
                taken, self._waiting = bytes(self._waiting), bytearray()
            try:
                if sys.stdout is not None:
                    # to the descriptor itself: a buffer keeps what failed, and fails again as the interpreter ends
                    write_all(sys.stdout.fileno(), taken)
            except OSError as error:
                self._tell("the terminal", error.strerror or str(error))

    def _tell(self, what: str, why: str) -> None:
        """Say it once, and beside the copying: where standard error is the same terminal, that may wait, too."""
        if what not in self._told:
            self._told.add(what)
            words = f"{what} cannot be written ({why}): what the ranks print is dropped there"
            threading.Thread(target=_log.warning, args=("%s", words), daemon=True).start()
