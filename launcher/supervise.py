"""Supervision of the processes of one attempt on one node: start, show, pass signals on, end what is left, report.

Launchers lose signals, so signals go to the ranks and never to a launcher (contract "Outcome"). What the ranks cannot
say themselves, because they were killed or hang, is in the `NodeReport`; what the run concludes from it, and what is
written to `outcome.json`, is up to `launcher.attempts`. Invariant: when `supervise` returns, no process of the attempt
is alive on this node. Nothing here knows torch.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import heartbeat, logs, outcome
from engine.config.schema.run import LaunchConfig
from engine.errors import EXIT_DONE, EXIT_REQUEUE, EnvironmentProblem
from engine.run_folder import RunFolder
from launcher import diagnosis, kernel, processes
from launcher.children import Child
from launcher.commands import Command
from launcher.verdict import End, Lost, NodeReport
from launcher.watchdog import Watchdog

POLL_SECONDS = 0.1
"""Seconds between two looks at the processes."""
GRACE_SECONDS = 5.0
"""Seconds that the others have to end by themselves once a rank has failed or their launcher is gone."""
SAME_SIGNAL_SECONDS = 5.0
"""Seconds after the first signal in which others count as part of it: clusters and terminals send several."""
LISTENING_SECONDS = 10.0
"""Seconds after which ranks are sent a signal even if some have given no sign of life."""
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
"""Signal that we get -> signal that the ranks get; all of them mean: save and stop."""

_log = logs.logger(__name__)


def supervise(
    commands: list[Command],
    owned: RunFolder,
    num_ranks: int,
    limits: LaunchConfig | None = None,
) -> NodeReport:
    """Start the commands of one attempt, wait for the end of their processes, and return what was seen of them.

    `owned` is the run folder, taken for the attempt; its job marks the processes (it is in the commands' environment).
    `num_ranks` is how many ranks the commands lead to. Call from the main thread: it handles the signals of `FORWARDED`
    while it waits.

    Raises:
        EnvironmentProblem: a command cannot be started, or the folder of the logs cannot be written.
    """
    start, log_folder = owned.start, owned.path / "logs"
    try:
        log_folder.mkdir(exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"run folder {owned.path} cannot be used: {error.strerror}",
            "a folder that can be written",
            "change `folder`",
        ) from error
    beats = Path(tempfile.mkdtemp(prefix="palimpsest-", dir=_memory()))
    watch = _Watch(start.job, owned.path, num_ranks, start.attempt, beats, Watchdog(limits or LaunchConfig()))
    # a SIGHUP that is ignored when the process starts stays ignored: that is what nohup means
    caught = [n for n in FORWARDED if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, watch.on_signal) for number in caught}
    try:
        for command in commands:
            shown = command is commands[0]
            # Added one by one: where a later command cannot be started, `finally` ends those before it.
            watch.children.append(Child(command, {heartbeat.VARIABLE: str(beats)}, log_folder, shown))
        watch.wait()
    finally:
        # By their mark and not by parentage: ranks that have outlived their launcher are ended, too.
        processes.send(processes.marked(start.job), signal.SIGKILL)
        ends = tuple(child.end() for child in watch.children)
        # Only now: a signal meanwhile would end this process and leave the children unread.
        for number, handler in before.items():
            signal.signal(number, handler)
        # The outcome that a rank could not write to the run folder (a full disk) is read before its folder goes.
        aside = outcome.read(beats)
        shutil.rmtree(beats, ignore_errors=True)
    return NodeReport(ends, watch.first, watch.gone, watch.lost, watch.stopping, aside)


def last_lines(folder: Path, name: str, count: int = 15) -> str:
    """Return the end of one process's log, for a user who would open it next; empty where it cannot be read."""
    try:
        text = (folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-count:])


def _memory() -> str | None:
    """Return a folder in memory, where there is one: heartbeats are for as long as the node is up."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass
class _Watch:
    """State of the processes of an attempt on this node, and signals that have arrived."""

    job: str
    folder: Path
    num_ranks: int
    attempt: int
    heartbeats: Path
    watchdog: Watchdog
    children: list[Child] = field(default_factory=list)
    first: End | None = None
    """The first process that failed."""
    gone: frozenset[int] = frozenset()
    """Ranks that had ended when the outcome of a failure came to light."""
    lost: Lost | None = None
    """Ranks that were killed, or hang."""
    _failure_said: bool = False
    _killed_before: int = field(default_factory=kernel.num_killed_for_memory)
    _signals: list[signal.Signals] = field(default_factory=list)
    _signalled_at: float | None = None
    _unsent: list[signal.Signals] = field(default_factory=list)
    _looked_at: float = field(default_factory=time.monotonic)
    _deadline: float | None = None
    """Time on the monotonic clock at which all that still runs is killed; None while nothing has failed."""

    def on_signal(self, number: int, _frame: Any) -> None:
        # A handler may run between any two instructions, so it only notes; `_handle_signals` acts.
        self._signals.append(signal.Signals(number))

    @property
    def stopping(self) -> bool:
        """True if somebody asked the run to stop."""
        return self._signalled_at is not None

    def wait(self) -> None:
        """Return when every process has ended, or when the rest is to be killed."""
        while self._anything_alive():
            self._handle_signals()
            self._notice_failures()
            self._notice_hangs()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                break
            time.sleep(POLL_SECONDS)
        self._notice_killed()

    def _anything_alive(self) -> bool:
        """Return True if a process runs, also for ranks that have outlived their launcher."""
        return any(child.popen.poll() is None for child in self.children) or bool(processes.marked(self.job))

    def _notice_failures(self) -> None:
        """Start the clock of the others as soon as one process has failed, and name it."""
        ends = self._ends()
        failed = [end for end in ends if end.code not in (EXIT_DONE, EXIT_REQUEUE)]
        if self.first is None and failed:
            self._notice_killed()
            # Several may have ended between two looks: a killed one is the cause, the others missed it in a collective.
            self.first = next((end for end in failed if end.code == -signal.SIGKILL), failed[0])
            _log.warning("%s: ending the others", self.lost.how if self.lost else self.first)
        # A rank that has failed says so before it ends; interpreters of large runs take seconds to end.
        said = (outcome.read(folder) for folder in (self.folder, self.heartbeats))
        own = next((one for one in said if one is not None and one.is_of(self.job, self.attempt)), None)
        if not self._failure_said and own is not None and own.code not in (EXIT_DONE, EXIT_REQUEUE):
            self._failure_said = True
            alive = {rank.global_rank for rank in processes.ranks(processes.marked(self.job))}
            # Ranks that had vanished before the first word of a failure are its cause, not its consequence.
            self.gone = frozenset(range(self.num_ranks)) - alive
        if self._deadline is None and (failed or self._failure_said or len(ends) == len(self.children)):
            self._deadline = time.monotonic() + GRACE_SECONDS

    def _notice_killed(self) -> None:
        """Record the ranks that were killed by SIGKILL, which the supervisor has not sent yet."""
        killed = [end for end in self._ends() if end.code == -signal.SIGKILL and end.global_rank is not None]
        if self.lost is not None or not killed:
            return
        beats = {end.global_rank: heartbeat.read(self.heartbeats, end.global_rank or 0) for end in killed}
        told = [
            f"rank {rank} was killed by SIGKILL" + (f" {beat.where}" if beat is not None else "")
            for rank, beat in beats.items()
        ]
        # The counter is the node's: the kernel may have killed another user's process, so it is told and not concluded.
        memory = kernel.num_killed_for_memory() - self._killed_before
        if memory > 0:
            told.append(f"the kernel has killed for want of memory meanwhile ({memory} times on this node)")
        steps = [beat.step for beat in beats.values() if beat is not None]
        ranks = frozenset(end.global_rank for end in killed if end.global_rank is not None)
        self.lost = Lost(ranks, "; ".join(told), max(steps, default=0), "killed by SIGKILL")

    def _notice_hangs(self) -> None:
        """Name the rank that holds up the others, with everybody's stack, and end them all at once."""
        now = time.monotonic()
        # The time is taken before the deadline is looked at, so that no part of it counts twice.
        seconds, self._looked_at = now - self._looked_at, now
        if self._deadline is not None:
            return
        beats = {rank: heartbeat.read(self.heartbeats, rank) for rank in range(self.num_ranks)}
        if self.watchdog.look(beats, seconds) is None:
            return
        silent = {rank: watched.silent_seconds for rank, watched in self.watchdog.ranks.items()}
        seen = diagnosis.look_at(processes.ranks(processes.marked(self.job)), beats, silent)
        self._deadline = now
        if not seen:
            return
        report = self.folder / "logs" / f"hang-{self.attempt}.txt"
        try:
            report.write_text(diagnosis.as_text(seen), encoding="utf-8")
        except OSError as error:
            _log.warning("%s cannot be written (%s):\n%s", report, error.strerror, diagnosis.as_text(seen))
        culprit, words = diagnosis.suspect(seen), diagnosis.in_words(seen)
        step, phase = (culprit.beat.step, culprit.beat.phase) if culprit.beat else (0, "start")
        how = f"{words}; all stacks: {report}"
        self.lost = Lost(frozenset((culprit.global_rank,)), how, step, f"hangs in {phase}")
        _log.warning("%s: ending the ranks\n%s", words, "\n".join(f"    {frame}" for frame in culprit.stack))

    def _handle_signals(self) -> None:
        """Pass the first signal on to the ranks; one that comes later ends the run at once."""
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
        if self._unsent and (ranks := self._listening(now)):
            processes.send(ranks, self._unsent.pop())

    def _listening(self, now: float) -> list[processes.Process]:
        """Return the ranks, once they are there to hear a signal: one before their handlers would kill them."""
        ranks = processes.ranks(processes.marked(self.job))
        listening = [rank for rank in ranks if heartbeat.read(self.heartbeats, rank.global_rank or 0)]
        # A rank gives its first sign of life once its handlers are set (`tools.train`).
        waited = now - (self._signalled_at or now) > LISTENING_SECONDS
        return ranks if waited or len(listening) == self.num_ranks else []

    def _ends(self) -> list[End]:
        return [End(child.name, child.popen.returncode) for child in self.children if child.popen.poll() is not None]
