"""Standard output and error that never cost a run: text that cannot be written is dropped, and a warning says so once.

A terminal that is closed, `| head` and a full disk make every print raise, a library's, too. `lenient` replaces both
by streams that drop what they cannot write, and that remember whether their reader has gone: a run takes that as a
request to stop (`engine.train.signals`). What has to be written (metrics, checkpoints) does not go through here.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO


class Watched:
    """A text stream that remembers the error with which it could not be written; everything else is the stream's."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.failure: OSError | None = None
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        known = text.encode(encoding, "backslashreplace").decode(encoding)  # not every locale has every letter
        self._attempt(lambda: self._stream.write(known))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def leave(self) -> None:
        """Write what is left, or send it nowhere: the interpreter would write it as it ends, and exit with 120."""
        try:
            self._stream.flush()
            if self.failure is None:
                return
        except OSError:
            pass
        with contextlib.suppress(OSError):
            # The buffer still holds text. With /dev/null under the descriptor the interpreter's own flush succeeds.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.failure = error
            raise


class Lenient(Watched):
    """A text stream that drops what the stream below it cannot write."""

    def __init__(self, stream: TextIO, name: str) -> None:
        super().__init__(stream, name)
        self.reader_is_gone = False

    def _attempt(self, action: Any) -> None:
        first = self.failure is None
        try:
            super()._attempt(action)
        except OSError as error:
            self.reader_is_gone |= isinstance(error, BrokenPipeError | ConnectionResetError)
            if first:
                # Told on the other stream, which may be lenient, too: it drops this line in the worst case.
                other = sys.stdout if self is sys.stderr else sys.stderr
                reason = error.strerror or type(error).__name__
                print(f"{self._name} cannot be written ({reason}): it is dropped", file=other, flush=True)


def spell_everything() -> None:
    """Have standard output and error write characters that their encoding lacks as escapes (\\u4e2d).

    A locale without UTF-8, and file names that are no text, must not end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def watched(kind: type[Watched] = Watched) -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams of a kind (None stays: that descriptor is closed)."""
    before = sys.stdout, sys.stderr
    # None: Python's own value for a closed descriptor, as under some daemons.
    inside: list[Any] = [
        None if stream is None else kind(stream, name)
        for stream, name in zip(before, ("standard output", "standard error"), strict=True)
    ]
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:
        for stream in inside:
            if stream is not None:
                stream.leave()
        sys.stdout, sys.stderr = before


def lenient() -> contextlib.AbstractContextManager[None]:
    """Replace standard output and error by lenient streams."""
    return watched(Lenient)


def failed_stream(error: OSError) -> str | None:
    """Name of the standard stream that could not be written with this error; None where it came from elsewhere."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Watched)]
    # By identity: another file may have failed with an equal error.
    return next((stream._name for stream in streams if stream.failure is error), None)


def reader_is_gone() -> bool:
    """Return True if a write to standard output or error has found its reader gone (`train ... | head`)."""
    return any(isinstance(stream, Lenient) and stream.reader_is_gone for stream in (sys.stdout, sys.stderr))


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting where the descriptor does not block; on `OSError` a part of it may be written."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        # A pipe that another program has set non-blocking and that is full: wait for its reader.
        except BlockingIOError:
            select.select([], [descriptor], [])
