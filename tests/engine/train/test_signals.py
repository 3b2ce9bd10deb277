"""Signals to this process, and to real ones that wait inside torch, where Python runs no signal handler."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import output
from engine.errors import EXIT_FAILURE, EXIT_REQUEUE
from engine.train import signals
from engine.train.signals import StopSignals
from launcher.ports import free_port

REPOSITORY = Path(__file__).parents[3]
WAIT_SECONDS = 120
"""Upper bound of every wait; nothing waits that long unless the test fails."""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize("number", signals.STOP)
def test_a_signal_asks_to_stop_and_is_only_caught_inside(number: signal.Signals) -> None:
    before, descriptors = signal.getsignal(number), len(os.listdir("/proc/self/fd"))
    with StopSignals() as stop:
        assert not stop.stop_requested
        os.kill(os.getpid(), number)
        assert stop.stop_requested
    assert signal.getsignal(number) is before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_signals_close_together_count_as_one_and_a_later_one_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ended, stop = [100.0], [], StopSignals()
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    stop._count(signal.SIGTERM)
    clock[0] += signals.SAME_SIGNAL_SECONDS - 0.1
    stop._count(signal.SIGUSR1)
    assert stop.stop_requested
    assert not ended
    clock[0] += 0.2
    stop._count(signal.SIGTERM)
    assert ended == [EXIT_FAILURE]


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.stop_requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


REPEATS = """
import os, signal, sys
from engine.errors import EXIT_REQUEUE
from {module} import {name}

with {name}() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    stop.ignore_from_now_on()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    os.kill(os.getpid(), number)
sys.exit(EXIT_REQUEUE)
"""


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize(("module", "name"), [("engine.train.signals", "StopSignals"), ("launcher.signals", "Signals")])
def test_signals_that_come_again_while_a_saved_run_ends_leave_its_exit_code(module: str, name: str) -> None:
    """After the handlers are gone and before the process is: a preemption sends SIGTERM more than once."""
    rank = _start(REPEATS.format(module=module, name=name))
    _, errors = rank.communicate(timeout=WAIT_SECONDS)
    assert (rank.returncode, errors.count("Traceback")) == (EXIT_REQUEUE, 0), errors


def test_output_that_nobody_reads_asks_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as broken, monkeypatch.context() as patch, StopSignals() as stop:
        patch.setattr(sys, "stdout", output.Lenient(broken, "standard output"))
        assert not stop.stop_requested
        print("a line", flush=True)
        assert stop.stop_requested
        sys.stdout.leave()  # type: ignore[attr-defined]


MEETS = """
import sys, torch
from engine.config.rank_environment import RankEnvironment
from engine.parallel.groups import connect
from engine.train import signals

signals.SAME_SIGNAL_SECONDS = 0.0
rank, port = int(sys.argv[1]), int(sys.argv[2])
import os
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
with signals.StopSignals():
    print("ready", flush=True)
    connect(RankEnvironment(global_rank=rank, world_size=2, local_rank=rank, master_port=port), torch.device("cpu"))
    print("met", flush=True)
    if rank == 0:
        torch.distributed.barrier()
    sys.stdin.read()
"""


def test_a_second_signal_ends_a_rank_that_waits_for_the_others_to_meet() -> None:
    """The main thread is in C++ all the while: once it listens at the port, it waits for the other rank."""
    port = free_port()
    rank = _start(MEETS, 0, port)
    try:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens)
        _end_by_two_signals(rank)
    finally:
        rank.kill()


def test_a_second_signal_ends_a_rank_that_waits_in_a_collective() -> None:
    port = free_port()
    ranks = [_start(MEETS, rank, port) for rank in (0, 1)]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "met\n"
        _end_by_two_signals(ranks[0])
    finally:
        for rank in ranks:
            rank.kill()


def _start(code: str, *arguments: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _end_by_two_signals(rank: subprocess.Popen[str]) -> None:
    """The second once the first was seen to arrive."""
    assert rank.stderr is not None
    rank.send_signal(signal.SIGTERM)
    while "SIGTERM: saving" not in (line := rank.stderr.readline()):
        assert line, "ended without a word"
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(WAIT_SECONDS) == EXIT_FAILURE
    assert "second SIGTERM: ending at once" in rank.stderr.read()
