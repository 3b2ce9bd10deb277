"""Contestants that run in turn, each in a process of its own, and the ratios of their times.

Each contestant trains on at its own pace inside its process and stops at the boundary of a step until the parent
grants it more steps. So all of them stand ready, one runs at a time, caches and allocators are their own, and a slow
minute of a shared machine falls on all alike: only ratios within one round are compared. CPU seconds are those of
the contestant's whole process, of all its threads. A contestant that owns its loop (transformers' Trainer) fits as
well as one that is called step by step.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from engine.errors import PalimpsestError

Side = TypeVar("Side")

END_SECONDS = 5.0
"""What an ended process is given to leave before it is killed."""


class ContestFailed(PalimpsestError):
    """A process of a benchmark failed, or did not answer in time."""


class Finished(Exception):
    """Raised inside a contestant at a step's boundary when the contest is over."""


@dataclass(frozen=True)
class Lap:
    """What one contestant did in one turn."""

    wall_seconds: float
    cpu_seconds: float
    losses: list[float]


class Turns:
    """The contestant's end: `begin_step` before each step, `loss` after its forward pass."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left: int | None = None
        self._losses: list[Any] = []
        self._wall = self._cpu = 0.0

    def begin_step(self) -> None:
        """Returns when the next step may begin; between turns that takes as long as the others run.

        Raises:
            Finished: no more steps are asked for.
        """
        if not self._left:
            self._report()
            self._left = self._connection.recv()
            if not self._left:
                raise Finished
            self._losses.clear()
            self._cpu, self._wall = time.process_time(), time.perf_counter()
        self._left -= 1

    def loss(self, value: Any) -> None:
        """Notes the loss of the step (a number or a tensor of one element, read when the turn is over)."""
        self._losses.append(value)

    def _report(self) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if self._left is None:
            self._connection.send("ready")
        else:
            self._connection.send(Lap(wall, cpu, [float(value) for value in self._losses]))


class Worker:
    """A process that runs `function(connection, *arguments)`; what it sends is received here."""

    def __init__(
        self,
        name: str,
        method: str,
        environment: Mapping[str, str],
        function: Callable[..., None],
        *arguments: Any,
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["bench.preload"])
        self.name = name
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
        with _environ(environment):
            self._process.start()
        theirs.close()

    def receive(self, timeout_seconds: float) -> Any:
        """The next thing that the process sends.

        Raises:
            ContestFailed: it raised, died, or sent nothing in time.
        """
        if not self.connection.poll(max(timeout_seconds, 0.0)):
            self.end()
            raise ContestFailed(f"{self.name}: no answer within {timeout_seconds:.0f} seconds")
        try:
            value = self.connection.recv()
        except EOFError:
            self._process.join(END_SECONDS)
            code = self._process.exitcode
            raise ContestFailed(f"{self.name}: its process ended with exit code {code} and said nothing") from None
        if isinstance(value, _Failure):
            raise ContestFailed(
                f"{self.name} failed:\n{value.traceback}", remedy="mend what the traceback says, or leave this side out"
            )
        return value

    def end(self) -> None:
        """Kills the process if it is still there."""
        self._process.kill()
        self._process.join()
        self.connection.close()


class Contestant:
    """One side of a comparison: `function(turns, *arguments)` in a process of its own, ready for laps."""

    TIMEOUT_SECONDS = 600.0

    def __init__(self, name: str, method: str, function: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self._worker = Worker(name, method, {}, _contestant, function, arguments)

    def wait_ready(self) -> None:
        """Returns when the contestant stands before its first step."""
        self._worker.receive(self.TIMEOUT_SECONDS)

    def lap(self, num_steps: int) -> Lap:
        """Lets the contestant do `num_steps` steps."""
        self._worker.connection.send(num_steps)
        return self._worker.receive(self.TIMEOUT_SECONDS)

    def end(self) -> None:
        self._worker.end()


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some numbers."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f}..{self.greatest:.3f})"


def run_rounds(contestants: Sequence[Contestant], rounds: int, num_steps: int) -> dict[str, list[Lap]]:
    """Every contestant's laps, one per round; who goes first moves on by one each round."""
    laps: dict[str, list[Lap]] = {contestant.name: [] for contestant in contestants}
    for contestant in in_turn(contestants, rounds):
        laps[contestant.name].append(contestant.lap(num_steps))
    return laps


def in_turn(sides: Sequence[Side], rounds: int) -> Iterator[Side]:
    """Every side once per round; who goes first moves on by one."""
    for number in range(rounds):
        first = number % len(sides)
        yield from (*sides[first:], *sides[:first])


def ratios(laps: Sequence[Lap], against: Sequence[Lap], clock: str = "cpu_seconds") -> Spread:
    """Time of `laps` over that of `against`, round by round."""
    return Spread.of([getattr(one, clock) / getattr(other, clock) for one, other in zip(laps, against, strict=True)])


@dataclass(frozen=True)
class _Failure:
    traceback: str


def _run(connection: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(connection, *arguments)
    except BaseException:
        connection.send(_Failure(traceback.format_exc()))
    connection.close()
    os._exit(0)  # no teardown: DeepSpeed's and gloo's threads would be waited for


def _end_with_parent() -> None:
    """End this process once the one that asked for it is gone: killed, it could not end its workers itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _contestant(connection: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        function(Turns(connection), *arguments)
    except Finished:
        return


@contextmanager
def _environ(changes: Mapping[str, str]) -> Iterator[None]:
    """The environment that a process started inside inherits."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
