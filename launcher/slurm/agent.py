"""The agent of a node: tells the conductor how the ranks there are, and ends them where nobody else would.

Srun starts one agent per node for as long as the job lasts. It reports twice a second (beats, ends, live ranks) and
does what the conductor asks: make room for an attempt, signal the ranks, take their stacks, kill them. Ranks are found
by their mark, so that Slurm is not needed to end them.

Where the conductor is silent, its node is lost, or this one is cut off. The ranks are killed in either case: nobody
supervises them, and a newer attempt may have begun. Only an agent that reaches Slurm but not the conductor, which has
given no sign of life on the shared disk either, requeues the job, within the job's limit: with `--no-kill` it would be
RUNNING for ever without a batch script.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine import heartbeat, logs, outcome
from engine.errors import EXIT_FAILURE, EnvironmentProblem
from engine.outcome import Outcome
from engine.run_folder import RunFolder, Start
from launcher import diagnosis, kernel, processes
from launcher.node_checks import Needs
from launcher.ports import free_port
from launcher.preflight import check_node
from launcher.slurm import client, fitness, follow_up, spec, starts, wire
from launcher.slurm.life import Silence
from launcher.slurm.render import MARK
from launcher.slurm.starts import JobStart

JOB_FOLDER = "PALIMPSEST_JOB_FOLDER"
"""Variable that holds the folder of the job."""
SEARCH_SECONDS = 600.0
"""Seconds that an agent which reaches neither conductor nor Slurm waits before it ends."""
KILL_POLL_SECONDS = 0.1
LONGEST_TICK_SECONDS = 2.0
"""Most seconds of silence that one look counts: a node that was frozen did not listen meanwhile."""
SIOCGIFADDR = 0x8915
"""Request of Linux for the IPv4 address of an interface."""

_log = logs.logger(__name__)


def beats_folder(job: str, attempt: int) -> Path:
    """Return the folder in a node's memory that takes the signs of life of its ranks, the same on every node."""
    return Path("/dev/shm") / f"palimpsest-{os.getuid()}-{job}.{attempt}"


@dataclass
class Attempt:
    """The attempt whose ranks this agent watches."""

    job: str
    number: int
    ranks: range
    """Global ranks of this node."""
    killed_before: int = field(default_factory=kernel.num_killed_for_memory)

    def __post_init__(self) -> None:
        self._mark = f"{MARK}={self.job}.{self.number}"
        self._watch = processes.Watch(self._mark)

    @property
    def beats(self) -> Path:
        return beats_folder(self.job, self.number)

    def processes(self) -> list[processes.Process]:
        """Return the processes of the ranks, and those that these have started."""
        return processes.with_variable(self._mark)

    def status(self) -> wire.Message:
        """Return what the conductor is told, twice a second."""
        # The outcome first: ranks are then seen as they were after it was written.
        aside = outcome.read(self.beats)
        alive = [process.global_rank for process in processes.ranks(self._watch.look())]
        beats = {rank: heartbeat.read(self.beats, rank) for rank in self.ranks}
        return {
            "attempt": self.number,
            "alive": alive,
            "beats": {rank: asdict(beat) for rank, beat in beats.items() if beat is not None},
            "ends": {rank: code for rank in self.ranks if (code := self._end(rank)) is not None},
            "memory": kernel.num_killed_for_memory() - self.killed_before,
            "aside": asdict(aside) if aside is not None else None,
        }

    def kill(self) -> None:
        """End every process of the ranks; return when none is left, or none reacts."""
        deadline = time.monotonic() + wire.SILENT_SECONDS / 2
        # Again and again: a process that is being started inherits the mark a moment later.
        while (found := self.processes()) and time.monotonic() < deadline:
            processes.send(found, signal.SIGKILL)
            time.sleep(KILL_POLL_SECONDS)

    def _end(self, rank: int) -> int | None:
        """Return the exit code of a rank, which `rank.sh` has written; the shell's 128 + signal as a negative one."""
        try:
            code = int((self.beats / f"end-{rank}").read_text())
        except (OSError, ValueError):  # not ended yet, or half written
            return None
        return code if code <= 128 else 128 - code


class Agent:
    """One connection to the conductor, and what it asks for."""

    def __init__(self, line: wire.Line, job: str) -> None:
        self.line, self.job = line, job
        self.attempt: Attempt | None = None
        self.dismissed = False
        """The conductor has said that the job needs this agent no more."""
        self._heard = True
        self._gone = threading.Event()

    def serve(self) -> None:
        """Report and obey until the conductor is silent or says goodbye; then end the ranks."""
        threading.Thread(target=self._read, daemon=True).start()
        silent_seconds, looked_at = 0.0, time.monotonic()
        while silent_seconds < wire.SILENT_SECONDS and not self._gone.is_set():
            self._tell()
            self._gone.wait(wire.BEAT_SECONDS)
            now = time.monotonic()
            silent_seconds = 0.0 if self._heard else silent_seconds + min(now - looked_at, LONGEST_TICK_SECONDS)
            self._heard, looked_at = False, now
        self.line.close()
        if self.attempt is not None:
            self.attempt.kill()
            shutil.rmtree(self.attempt.beats, ignore_errors=True)

    def _tell(self) -> None:
        status: wire.Message = self.attempt.status() if self.attempt is not None else {}
        self.line.send({"say": "status", **status})

    def _read(self) -> None:
        for message in self.line.messages():
            if message is None:
                continue
            self._heard = True
            self._obey(message)
            if self.dismissed:
                break
        self._gone.set()

    def _obey(self, message: wire.Message) -> None:
        asked = message.get("do")
        if asked == "bye":
            self.dismissed = True
        elif asked == "prepare":
            self._prepare(Attempt(self.job, message["attempt"], range(*message["ranks"])))
        elif asked == "signal" and self.attempt is not None:
            processes.send(processes.ranks(self.attempt.processes()), signal.Signals(message["number"]))
        elif asked == "kill" and self.attempt is not None:
            self.attempt.kill()
            self._tell()
        elif asked == "check":
            # Beside the reading: a check may wait for a file system, and the conductor's pings must be heard.
            threading.Thread(target=self._check, args=(fitness.from_json(message["needs"]),), daemon=True).start()
        elif asked == "look" and self.attempt is not None:
            silent = {int(rank): seconds for rank, seconds in message["silent"].items()}
            beats = {rank: heartbeat.read(self.attempt.beats, rank) for rank in self.attempt.ranks}
            seen = diagnosis.look_at(processes.ranks(self.attempt.processes()), beats, silent)
            self.line.send({"say": "seen", "seen": [diagnosis.to_json(one) for one in seen]})

    def _check(self, needs: Needs) -> None:
        report = check_node(needs)
        self.line.send({"say": "checked", "report": report.as_json(), "clock": time.time()})

    def _prepare(self, attempt: Attempt) -> None:
        """End what an earlier attempt has left, and make room for the signs of life of the next."""
        if self.attempt is not None:
            self.attempt.kill()
            shutil.rmtree(self.attempt.beats, ignore_errors=True)
        shutil.rmtree(attempt.beats, ignore_errors=True)
        attempt.beats.mkdir(parents=True)
        self.attempt = attempt
        self.line.send({"say": "ready", "attempt": attempt.number, "port": free_port()})


def main() -> int:
    """Serve the conductor of this job; return the exit code."""
    logs.configure()
    folder = Path(os.environ[JOB_FOLDER])
    job, this = spec.read(folder), starts.from_text(os.environ[starts.VARIABLE])
    # The ranks get their signals from the conductor, and from Slurm: the agent outlives them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + SEARCH_SECONDS
    last: Attempt | None = None
    silence = Silence(folder)
    while True:
        line = _connect(job)
        if line is not None:
            agent = Agent(line, this.job)
            agent.serve()
            if agent.dismissed:
                return 0
            deadline, last = time.monotonic() + SEARCH_SECONDS, agent.attempt or last
            _log.warning("the conductor is silent: the ranks of this node were ended")
            # Read only now: the disk may hang together with the network, and the ranks had to be ended first.
            silence = Silence(folder)
            # Agents of several nodes: the first one to ask finds the job running, the others find it requeued.
            time.sleep(min(int(os.environ.get("SLURM_NODEID", "0")), 10))
            continue
        if _leave(job, this, last, silence) or time.monotonic() >= deadline:
            return EXIT_FAILURE
        time.sleep(2.0)


def _connect(job: spec.JobSpec) -> wire.Line | None:
    """Return a connection to the conductor, to which this agent has said who it is; None where there is nobody."""
    host, _, port = os.environ[wire.CONDUCTOR].rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=wire.SILENT_SECONDS)
    except OSError as error:
        _log.warning("the conductor at %s:%s cannot be reached: %s", host, port, error)
        return None
    line = wire.Line(connection)
    interface = job.site.network.interface
    hello: dict[str, Any] = {
        "token": os.environ[wire.TOKEN],
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "number": int(os.environ.get("SLURM_NODEID", "0")),
        "address": address_of(interface) if interface else "",
    }
    return line if line.send(hello) else None


def address_of(interface: str) -> str:
    """Return the IPv4 address of an interface of this node; empty where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, contextlib.suppress(OSError):
        # struct ifreq: the name, and behind a family and a port the address in bytes 20 to 24.
        found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return ""


def _leave(job: spec.JobSpec, this: JobStart, last: Attempt | None, silence: Silence) -> bool:
    """See to the job's next start, if Slurm answers that it is still this one and the conductor gives no sign of life.

    Returns True where nothing is left to do.
    """
    try:
        found = client.allocated(this.number)
    except EnvironmentProblem as error:
        _log.warning("%s", error.wrong)
        return False  # this node is the one that is cut off, or the controller is restarted
    if found is None or not found.is_running or found.restarts != this.requeues:
        return True
    # Looked at after Slurm's answer: a node that was cut off is back then, and sees what was written meanwhile.
    if silence.is_broken:
        _log.warning("the conductor lives: the job goes on without this node")
        return True
    if not silence.is_certain:
        return False
    lost = f"the batch host {found.batch_host} was lost"
    limit = job.requeues if job.chain is None else job.chain - 1
    if this.index < limit and job.site.requeue == "slurm" and job.chain is None:
        refused = client.requeue(this.number)
        _log.warning("%s: %s", lost, refused or "the job is requeued")
        return not refused
    if this.index < limit and job.chain is None and job.site.requeue == "resubmit":
        try:
            follow_up.submit_successor(job, this, [found.batch_host])
        except EnvironmentProblem as error:
            _log.warning("%s: %s", lost, error.wrong)
            return False
    elif this.index >= limit or job.chain is None:
        _note_loss(job, this, last, lost)
    # Without its script the job would hold its nodes for ever (--no-kill); what follows it waits for its end.
    _log.warning("%s: cancelling the job", lost)
    return not client.cancel(this.number)


def _note_loss(job: spec.JobSpec, this: JobStart, last: Attempt | None, lost: str) -> None:
    """Write the outcome of a job whose script is lost and that does not start again."""
    if job.chain is None and job.site.requeue == "none":
        words = f"{lost}, and this site requeues no jobs"
    else:
        spent = f"{job.requeues} requeues" if job.chain is None else f"{job.chain} links of the chain"
        words = f"{lost}, and all {spent} are used up"
    attempt = last.number if last is not None else this.first_attempt
    RunFolder(job.run_folder, Start(this.job, attempt)).note_failure(
        Outcome(this.job, attempt, EXIT_FAILURE, 0, None, words)
    )


if __name__ == "__main__":
    sys.exit(main())
