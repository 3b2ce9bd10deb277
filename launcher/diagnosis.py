"""Diagnosis of a run that hangs, taken from outside: the rank that holds up the others, and its position, in words.

Stacks come from py-spy, which reads a process's memory without its help, so that a stopped one answers, too. It needs
the right to trace (root, CAP_SYS_PTRACE, or a process of the same user where the kernel allows it); where that is
refused the report says so and goes by phases and process states alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.heartbeat import Beat
from engine.run_folder import Start
from launcher.commands import program
from launcher.processes import Process, state_of

STACK_SECONDS = 5.0
"""Seconds that py-spy may take for one process."""
ATTEMPTS = 5
"""Number of tries to read a stack: a running process may be read in mid-change."""
COLLECTIVE_FILES = ("torch/distributed/distributed_c10d.py", "engine/parallel/collectives.py")
"""Ends of the paths of files whose functions are collectives."""
STOPPED = "Tt"
"""Letters of the kernel for a process that is stopped: by a signal, by a tracer."""


@dataclass(frozen=True)
class Frame:
    """One call of a stack, at `line`."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


@dataclass(frozen=True)
class Seen:
    """One rank as it was found."""

    global_rank: int
    state: str
    """The process's state as the kernel calls it: R running, S sleeping, D waiting for a device, T stopped."""
    beat: Beat | None
    silent_seconds: float
    stack: tuple[Frame, ...] = ()
    """Stack of the main thread, innermost call first; empty where it could not be taken."""
    refused: str = ""
    """Reason for which the stack could not be taken."""

    @property
    def collective(self) -> str | None:
        """The collective (or exchange with a neighbour) that the rank is in."""
        # The innermost public function, of torch's file before ours: `all_reduce`, and no helper below it.
        found = (frame for end in COLLECTIVE_FILES for frame in self.stack if frame.file.endswith(end))
        return next((frame.function for frame in found if not frame.function.startswith("_")), None)

    @property
    def where(self) -> str:
        """Step and phase in words."""
        return self.beat.where if self.beat else "before its first sign of life"


def stacks_file(run_folder: Path, start: Start) -> Path:
    """Return the file that takes the stacks of all ranks of an attempt that hangs."""
    return run_folder / "logs" / f"hang-{start.file_name}.txt"


def look_at(ranks: list[Process], beats: dict[int, Beat | None], silent_seconds: dict[int, float]) -> list[Seen]:
    """Return every rank as it is now; takes a few seconds at most."""

    def one(process: Process) -> Seen:
        global_rank = process.global_rank or 0
        stack, refused = take_stack(process.pid)
        state, silent = state_of(process.pid), silent_seconds.get(global_rank, 0.0)
        return Seen(global_rank, state, beats.get(global_rank), silent, stack, refused)

    # Together, so that the stacks are of about the same moment and eight slow ones do not add up.
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(one, ranks))


def take_stack(pid: int) -> tuple[tuple[Frame, ...], str]:
    """Return the stack of a process's main thread, and the reason where there is none."""
    # Read without pausing the process, which is therefore met in mid-change now and then (`ATTEMPTS`).
    command = [program("py-spy", sys.executable), "dump", "--nonblocking", "--json", "--pid", str(pid)]
    refused = ""
    for _ in range(ATTEMPTS):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STACK_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return (), f"py-spy cannot be run: {error}"
        if done.returncode == 0 and (stack := _main_thread(done.stdout, pid)):
            return stack, ""
        refused = " ".join(done.stderr.split())[:200]
        if "ermission" in refused:
            return (), "py-spy may not trace it: run as root, with CAP_SYS_PTRACE, or with kernel.yama.ptrace_scope = 0"
    return (), f"py-spy found no stack: {refused}"


def suspect(seen: list[Seen]) -> Seen:
    """Return the rank that most likely holds up the others.

    That is one that is stopped, else one outside of every collective while others wait in one, else the one with the
    fewest steps, else the one silent for longest."""

    def innocence(rank: Seen) -> tuple[bool, bool, int, float]:
        # Without a stack nothing speaks against the rank. False sorts before True: the least innocent comes first.
        waits = rank.collective is not None or not rank.stack
        return rank.state not in STOPPED, waits, rank.beat.step if rank.beat else -1, -rank.silent_seconds

    return min(seen, key=innocence)


def in_words(seen: list[Seen]) -> str:
    """Return one sentence for a user: the rank that hangs, since when, where, and what the others wait in."""
    culprit = suspect(seen)
    words = f"rank {culprit.global_rank} hangs: silent for {culprit.silent_seconds:.0f} s {culprit.where}"
    if culprit.state in STOPPED:
        words += ", its process is stopped (SIGSTOP)"
    elif culprit.state == "D":
        words += ", its process waits for a device or a file system"
    if culprit.stack:
        words += f", in {culprit.collective or culprit.stack[0]}"
    else:
        words += f" ({culprit.refused})"
    others: dict[tuple[str, str], list[int]] = {}
    for rank in seen:
        if rank is not culprit:
            where = ("waits", f"in {rank.collective}") if rank.collective else ("is", rank.where)
            # Ranks that are in one place share a phrase: most of a large world waits in the same collective.
            others.setdefault(where, []).append(rank.global_rank)
    for (verb, where), ranks in others.items():
        one = len(ranks) == 1
        plural = {"waits": "wait", "is": "are"}[verb]
        words += f"; rank{'' if one else 's'} {', '.join(map(str, ranks))} {verb if one else plural} {where}"
    return words


def as_text(seen: list[Seen]) -> str:
    """Return every rank with its whole stack, for a file."""
    parts = []
    for rank in seen:
        head = (
            f"rank {rank.global_rank}: silent for {rank.silent_seconds:.1f} s {rank.where}, process state {rank.state}"
        )
        stack = [f"    {frame}" for frame in rank.stack] or [f"    no stack: {rank.refused}"]
        parts.append("\n".join([head, *stack]))
    return "\n\n".join(parts) + "\n"


def to_json(seen: Seen) -> str:
    """Return a rank as JSON, for the watcher of another one (`from_json`)."""
    return json.dumps(asdict(seen))


def from_json(text: str) -> Seen:
    """Return the rank that `to_json` has written. Raises `ValueError`, `TypeError` or `KeyError`."""
    found = json.loads(text)
    beat = Beat(**found["beat"]) if found["beat"] else None
    return Seen(**(found | {"beat": beat, "stack": tuple(Frame(**frame) for frame in found["stack"])}))


def _main_thread(text: str, pid: int) -> tuple[Frame, ...]:
    """Return the frames of the main thread in py-spy's JSON: the thread that has the process's number, or that name."""
    try:
        threads = json.loads(text)
    except ValueError:
        return ()
    for thread in threads:
        if pid in (thread.get("os_thread_id"), thread.get("thread_id")) or thread.get("thread_name") == "MainThread":
            return tuple(Frame(frame["name"], _short(frame["filename"]), frame["line"]) for frame in thread["frames"])
    return ()


def _short(file: str) -> str:
    """Return a path from the package on."""
    parts = Path(file).parts
    for top in ("site-packages", "engine", "launcher", "tests"):
        if top in parts[:-1]:
            at = len(parts) - 1 - parts[::-1].index(top)
            return str(Path(*parts[at + (top == "site-packages") :]))
    return Path(file).name
