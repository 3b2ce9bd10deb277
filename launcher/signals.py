"""Signals that reach a supervisor, kept until somebody decides about them.

A handler may run between any two instructions, so it only notes what has arrived.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
"""Signal that we get -> signal that the ranks get; all of them mean: save and stop."""


@dataclass
class Signals:
    """Handlers of the signals of `FORWARDED` within the `with` block; enter it in the main thread."""

    arrived: list[signal.Signals] = field(default_factory=list)
    """All that have come, in order."""
    _taken: int = 0
    _before: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        # A SIGHUP that is ignored when the process starts stays ignored: that is what nohup means.
        for number in FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def ignore_from_now_on(self) -> None:
        """Ignore the signals until the process has ended: the ranks have saved, and its exit code has to say so."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def take(self) -> list[signal.Signals]:
        """Return those that have come since the last call."""
        # A handler may append meanwhile: what the slice does not have is returned by the next call.
        new = self.arrived[self._taken :]
        self._taken += len(new)
        return new

    def _note(self, number: int, _frame: Any) -> None:
        self.arrived.append(signal.Signals(number))
