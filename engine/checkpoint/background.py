"""A function in a thread of its own: the work of a save beside the training. It may use no collective.

The thread is a daemon: a process that ends in an error does not wait for a disk that hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Cancelled(Exception):
    """The function ended early because `Background.cancel` asked it to; no error of its own."""


class Background(Generic[Result]):
    """A running `function(cancelled)`; it should look at that event now and then and raise `Cancelled`."""

    def __init__(self, function: Callable[[threading.Event], Result], name: str) -> None:
        self._cancelled = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        # An event and not `thread.join`: it is also set where no thread could be started.
        self._ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no thread to be had: an error like any other of the function
            self._end(error)

    @property
    def done(self) -> bool:
        """True once the function has returned or raised."""
        return self._ended.is_set()

    @property
    def failed(self) -> bool:
        """True once the function has raised."""
        return self.done and self._error is not None

    def cancel(self) -> None:
        """Ask the function to end; return when it has."""
        # A thread cannot be killed: the function has to look at the event itself.
        self._cancelled.set()
        self._ended.wait()

    def result(self) -> Result:
        """Wait for the function; return its result or raise its error."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # no error, so there is a result

    def _run(self, function: Callable[[threading.Event], Result]) -> None:
        error: BaseException | None = None
        try:
            self._result = function(self._cancelled)
        except BaseException as problem:  # whatever ends the thread is told to whoever asks for its result
            error = problem
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._ended.set()
