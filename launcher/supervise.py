"""Watching over one launch on this node: start, show, pass signals on, end what is left, and say how it ended.

Launchers lose exit codes and signals, so signals go to the ranks and never to a launcher, and how the run ended is read
from `outcome.json` first and from exit codes second (contract "Outcome"). Invariant: when `supervise` returns, no
process of the launch is alive. One node only; nothing here knows torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import logs, outcome
from engine.errors import EXIT_DONE, EXIT_REQUEUE, EnvironmentProblem
from launcher import processes
from launcher.commands import Command
from launcher.verdict import End, Verdict, judge

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
"""How long the others have to end by themselves once a rank has failed or their launcher is gone."""
SAME_SIGNAL_SECONDS = 5.0
"""Signals so soon after the first are part of it: clusters and terminals send several."""
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
"""Signal that we get -> signal that the ranks get; all of them mean: save and stop."""

_log = logs.logger(__name__)


def supervise(commands: list[Command], job: str, folder: Path, num_ranks: int) -> Verdict:
    """Starts the commands, waits for the end, and says how the run went and with which exit code.

    `job` marks the processes (it is in the commands' environment); `folder` is the run folder, made if missing;
    `num_ranks` is how many ranks the commands lead to. Call from the main thread: it handles the signals of
    `FORWARDED` while it waits.

    Raises:
        EnvironmentProblem: a command cannot be started.
    """
    log_folder = folder / "logs"
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        outcome.clear(folder)
    except OSError as error:
        raise EnvironmentProblem(
            f"run folder {folder} cannot be used: {error.strerror}", "a folder that can be written", "change `folder`"
        ) from error
    watch = _Watch(job, folder, num_ranks)
    before = {number: signal.signal(number, watch.on_signal) for number in FORWARDED}
    try:
        for command in commands:
            watch.children.append(_Child(command, log_folder, shown=command is commands[0]))
        watch.wait()
    finally:
        processes.send(processes.marked(job), signal.SIGKILL)
        ends = [child.end() for child in watch.children]
        for number, handler in before.items():
            signal.signal(number, handler)
    return judge(outcome.read(folder), ends, watch.first, job, watch.gone)


def last_lines(folder: Path, name: str, count: int = 15) -> str:
    """The end of one process's log, for a user who would open it next."""
    text = (folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-count:])


class _Child:
    """One process that we started, in a session of its own so that a terminal's Ctrl-C reaches only us."""

    def __init__(self, command: Command, log_folder: Path, shown: bool) -> None:
        self.name = command.name
        self._log = (log_folder / f"{command.name}.log").open("ab")
        try:
            self.popen = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if shown else self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise EnvironmentProblem(
                f"{command.argv[0]} cannot be started: {error.strerror}",
                remedy="install the package in the environment that runs palimpsest, or use --launcher local",
            ) from error
        self._tee = threading.Thread(target=self._show, daemon=True) if shown else None
        if self._tee:
            self._tee.start()

    def _show(self) -> None:
        """Copies the output to the terminal and the log until the last process that holds the pipe is gone."""
        pipe: Any = self.popen.stdout
        while chunk := pipe.read1(1 << 16):
            self._log.write(chunk)
            self._log.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    def end(self) -> End:
        """How it ended; waits for that."""
        code = self.popen.wait()
        if self._tee:
            self._tee.join(timeout=GRACE_SECONDS)
        self._log.close()
        return End(self.name, code)


@dataclass
class _Watch:
    """What is known about a launch while it runs."""

    job: str
    folder: Path
    num_ranks: int
    children: list[_Child] = field(default_factory=list)
    first: End | None = None
    """The first process that failed."""
    gone: frozenset[int] = frozenset()
    """Ranks that had ended when the outcome of a failure came to light."""
    _failure_said: bool = False
    _signals: list[signal.Signals] = field(default_factory=list)
    _signalled_at: float | None = None
    _unsent: list[signal.Signals] = field(default_factory=list)
    _deadline: float | None = None
    """When whatever still runs is killed."""

    def on_signal(self, number: int, _frame: Any) -> None:
        self._signals.append(signal.Signals(number))

    def wait(self) -> None:
        """Returns when every process has ended, or when the rest is to be killed."""
        while self._anything_alive():
            self._handle_signals()
            self._notice_failures()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return
            time.sleep(POLL_SECONDS)

    def _anything_alive(self) -> bool:
        """Also true for ranks that have outlived their launcher."""
        return any(child.popen.poll() is None for child in self.children) or bool(processes.marked(self.job))

    def _notice_failures(self) -> None:
        """Starts the clock of the others as soon as one process has failed, and names it."""
        ends = [End(child.name, child.popen.returncode) for child in self.children if child.popen.poll() is not None]
        failed = [end for end in ends if end.code not in (EXIT_DONE, EXIT_REQUEUE)]
        if self.first is None and failed:
            self.first = failed[0]
            _log.warning("%s: ending the others", self.first)
        said = outcome.read(self.folder)
        if not self._failure_said and said is not None and said.code not in (EXIT_DONE, EXIT_REQUEUE):
            self._failure_said = True
            alive = {rank.global_rank for rank in processes.ranks(processes.marked(self.job))}
            self.gone = frozenset(range(self.num_ranks)) - alive
        if self._deadline is None and (failed or self._failure_said or len(ends) == len(self.children)):
            self._deadline = time.monotonic() + GRACE_SECONDS

    def _handle_signals(self) -> None:
        """Passes each kind of signal on once; one that comes later ends the run at once."""
        now = time.monotonic()
        while self._signals:
            number = self._signals.pop(0)
            if self._signalled_at is None:
                self._signalled_at = now
                self._unsent.append(FORWARDED[number])
                _log.info("%s: asking the ranks to save and stop; once more ends them at once", number.name)
            elif now - self._signalled_at > SAME_SIGNAL_SECONDS:
                _log.warning("%s again: ending the ranks at once", number.name)
                self._deadline = now
        if self._unsent and (ranks := processes.ranks(processes.marked(self.job))):
            processes.send(ranks, self._unsent.pop())
