"""One command of the demonstration at a time: shown as a user would type it, its output on the screen and in a log.

A command that fails ends the demonstration with its name and the path of its log.
"""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.errors import PalimpsestError

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
"""Variables that make every machine alike: the CPU, no network, and output as it comes."""
POLL_SECONDS = 0.05
QUIET_SECONDS = 2.0
"""Seconds without output after which a terminal shows that the command still works."""


Watch = Callable[[subprocess.Popen[bytes]], bool]


class DemoFailed(PalimpsestError):
    """A command of the demonstration failed, or did not do what it has to show."""


@dataclass
class Commands:
    """Runner of `palimpsest` commands in the current folder, each with a numbered file in `log_folder`."""

    log_folder: Path
    _count: int = 0

    def run(self, *arguments: str, watch: Watch | None = None) -> str:
        """Run `palimpsest ARGUMENTS` to its end; return what it printed.

        `watch` is called many times a second; once it has returned True, the command has been killed on purpose, and
        its exit code does not matter.

        Raises:
            DemoFailed: exit code other than 0, or a command that `watch` waited for in vain.
        """
        self._count += 1
        log = self.log_folder / f"{self._count:02d}-{arguments[0]}.log"
        shown = shlex.join(("palimpsest", *arguments))
        print(f"$ {shown}", flush=True)
        command = [str(Path(sys.executable).parent / "palimpsest"), *arguments]
        with (
            log.open("wb") as file,
            subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                killed = _follow(process, file, watch)
            except BaseException:
                process.terminate()  # `launch` then asks its ranks to save and stop
                raise
        if process.returncode != 0 and not killed:
            raise DemoFailed(
                f"`{shown}` ended with exit code {process.returncode}", "exit code 0", f"read {log}, then `make demo`"
            )
        if watch is not None and not killed:
            raise DemoFailed(f"`{shown}` ended before it could be killed", remedy=f"read {log}, then `make demo`")
        return log.read_text(encoding="utf-8", errors="replace")


def _follow(process: subprocess.Popen[bytes], log: BinaryIO, watch: Watch | None) -> bool:
    """Copy output to terminal and log until no process holds the pipe; return True if the command was killed."""
    assert process.stdout is not None
    descriptor, killed, started = process.stdout.fileno(), False, time.monotonic()
    heard = started
    while True:
        # `select` and not a blocking read, so that `watch` is called while the command is silent.
        if select.select([descriptor], [], [], POLL_SECONDS)[0]:
            chunk = os.read(descriptor, 1 << 16)
            # The end of the pipe comes when its last holder is gone, which may be a rank and not the command.
            if not chunk:
                return killed
            _wipe(heard)
            heard = time.monotonic()
            log.write(chunk)
            log.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        elif sys.stdout.isatty() and time.monotonic() - heard > QUIET_SECONDS:
            print(f"\r  ... {time.monotonic() - started:.0f} s", end="", flush=True)
        if watch is not None and not killed:
            killed = watch(process)


def _wipe(heard: float) -> None:
    """Remove the line which says that a command still works."""
    if sys.stdout.isatty() and time.monotonic() - heard > QUIET_SECONDS:
        print("\r\033[K", end="", flush=True)
