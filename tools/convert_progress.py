"""A line that shows how far a conversion has come, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from engine.config.paths import disk_path, expand


def local(source: str) -> Path:
    """Return the path of a source that is read from a disk. Raises `ConfigError` where it is a URL."""
    return Path(expand(disk_path(source, "SOURCE"), "SOURCE"))


def progress(verb: str, total: int | None, unit: str = "tokens") -> Callable[[int], None]:
    """Return a function that counts tokens or bytes and shows their number and rate on one line of a terminal."""
    console, done, began = Console(stderr=True), 0, time.monotonic()

    def show(count: int) -> None:
        nonlocal done
        done += count
        if console.is_terminal:
            rate = done / max(time.monotonic() - began, 1e-3)
            of = "" if total is None else f" of {total:,}"
            end = "\n" if total is not None and done >= total else "\r"
            console.print(f"{verb}: {done:,}{of} {unit} ({rate:,.0f} a second)", end=end)

    return show
