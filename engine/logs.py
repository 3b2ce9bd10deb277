"""Logging as every room uses it: one logger per module, one handler, rank named where it matters.

Only the rank that speaks for the run logs at INFO; the others log warnings and errors. Progress and metrics are
not logs: see `engine.train.metrics`.
"""

from __future__ import annotations

import logging
import sys

ROOT = "palimpsest"


def logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is `__name__`."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(global_rank: int = 0, world_size: int = 1, verbose: bool = False) -> None:
    """Sends the package's logs to standard error; call once per process, before the first message."""
    speaks = global_rank == 0
    where = f" [rank {global_rank}]" if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s{where} %(message)s", "%H:%M:%S"))
    root = logging.getLogger(ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.DEBUG if verbose else logging.INFO if speaks else logging.WARNING)
