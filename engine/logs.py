"""Logging of the whole package: one logger per module, one handler, the rank named where there are several.

Only the main rank logs at INFO; the others log warnings and errors. Progress and metrics are not logs: see
`engine.train.metrics`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.redact import redact_process

ROOT = "palimpsest"
PATIENCE_SECONDS = 5.0
"""Seconds after which a phase of a start is named in the log."""


def logger(name: str) -> logging.Logger:
    """Return the logger of one module; `name` is `__name__`."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(global_rank: int = 0, world_size: int = 1, verbose: bool = False) -> None:
    """Send the package's logs to standard error; call once per process, before the first message."""
    redact_process()
    speaks = global_rank == 0
    where = f" [rank {global_rank}]" if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s{where} %(message)s", "%H:%M:%S"))
    root = logging.getLogger(ROOT)
    # Replaced and not added to, so that a second call does not print every line twice.
    root.handlers[:] = [handler]
    # Libraries configure Python's own root logger, which would print every line once more.
    root.propagate = False
    root.setLevel(logging.DEBUG if verbose else logging.INFO if speaks else logging.WARNING)


@contextmanager
def phase(name: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Log the name of a phase once it takes longer than `patience_seconds`, and its time when it ends."""
    log = logger(__name__)
    if not log.isEnabledFor(logging.INFO):
        yield
        return
    begin = time.monotonic()
    # A thread: the phase itself is one long call, of an import or into a library.
    timer = threading.Timer(patience_seconds, log.info, ("%s ...", name))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.monotonic() - begin
        if seconds >= patience_seconds:
            log.info("%s took %s", name, duration(seconds))


def duration(seconds: float) -> str:
    """Return seconds in words: `40 s`, `12 min`, `3 h 05 min`; whole seconds below two minutes."""
    # 119.5 s rounds to 120 s, which is 2 min.
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min"
