"""Standard output and error that never cost a run: what cannot be written to them is dropped, and said once.

A terminal that is closed, `| head` and a full disk make every print raise, a library's, too. `lenient` puts streams in
place that drop what they cannot write. They keep in mind whether their reader has gone: to a run that trains this is a
request to stop (`engine.train.signals`). What has to be written (metrics, checkpoints) does not go through here.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO


class Lenient:
    """A text stream that drops what the stream below it cannot write; everything else is that stream's."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.reader_is_gone = False
        self._stream, self._name, self._failed = stream, name, False

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
        """Write what is left, or send it nowhere: the interpreter writes it as it ends, or exits with 120."""
        try:
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.reader_is_gone |= isinstance(error, BrokenPipeError | ConnectionResetError)
            first, self._failed = not self._failed, True
            if first:
                other = sys.stdout if self is sys.stderr else sys.stderr
                reason = error.strerror or type(error).__name__
                print(f"{self._name} cannot be written ({reason}): it is dropped", file=other, flush=True)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Put lenient streams in the place of `sys.stdout` and `sys.stderr` (None where a descriptor is closed)."""
    before = sys.stdout, sys.stderr
    inside: list[Any] = [
        None if stream is None else Lenient(stream, name)
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


def reader_is_gone() -> bool:
    """Whether a write to standard output or error has found that nobody reads it any more (`train ... | head`)."""
    return any(isinstance(stream, Lenient) and stream.reader_is_gone for stream in (sys.stdout, sys.stderr))


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting where the descriptor does not block; on `OSError` a part of it may be written."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
