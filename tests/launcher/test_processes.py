"""Looks for marked processes, again and again: what is read each time, over a table that stands for /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from launcher import processes
from launcher.processes import AGAIN_SECONDS, YOUNG_SECONDS, Process, Watch


class Node:
    """Processes of a node, whether they have the mark, and the ones that were read since the last question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marked: dict[int, bool] = {}
        self.now = 100.0
        self._read: list[int] = []
        monkeypatch.setattr(processes, "_others", lambda: iter(self.marked))
        monkeypatch.setattr(processes, "_read", self._look_at)
        monkeypatch.setattr(processes.time, "monotonic", lambda: self.now)

    def _look_at(self, pid: int, variable: bytes) -> Process | None:
        self._read.append(pid)
        return Process(pid, 1, None) if self.marked[pid] else None

    def look(self, watch: Watch) -> tuple[list[int], list[int]]:
        """Return the processes that a watch finds, and those that it has read for it."""
        self._read.clear()
        return [process.pid for process in watch.look()], self._read[:]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(monkeypatch)


def test_old_processes_without_the_mark_are_read_now_and_then(node: Node) -> None:
    watch = Watch("MARK=1")
    node.marked = {1: False, 2: True}
    assert node.look(watch) == ([2], [1, 2])
    node.now += YOUNG_SECONDS
    assert node.look(watch) == ([2], [1, 2]), "it is time to read all"
    node.now += 0.5
    assert node.look(watch) == ([2], [2])
    node.marked[3] = True
    assert node.look(watch) == ([2, 3], [2, 3]), "one that has just begun"
    del node.marked[2]
    node.now += AGAIN_SECONDS
    assert node.look(watch) == ([3], [1, 3])


def test_a_mark_that_comes_with_the_exec_is_seen_at_the_next_look(node: Node) -> None:
    """A process that was forked, but whose program has not begun, has the environment of its parent."""
    watch = Watch("MARK=1")
    node.marked = {1: False}
    node.look(watch)
    node.now += 0.5
    node.marked[7] = False
    assert node.look(watch) == ([], [1, 7])
    node.now += 0.5
    node.marked[7] = True
    assert node.look(watch)[0] == [7]


def test_a_mark_that_comes_late_is_seen_in_the_end(node: Node) -> None:
    watch = Watch("MARK=1")
    node.marked = {1: False}
    for _ in range(2):
        node.look(watch)
        node.now += YOUNG_SECONDS
    node.look(watch)
    node.marked[1] = True
    assert node.look(watch)[0] == []
    node.now += AGAIN_SECONDS
    assert node.look(watch)[0] == [1]


def test_real_processes() -> None:
    """A part of the value is another value, and one that has ended is not found."""
    mark = f"MARK=test-{os.getpid()}"
    name, _, value = mark.partition("=")
    program = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(program, env={**os.environ, name: value, "RANK": "3"}, stdin=-1, stdout=-1) as started:
        assert started.stdout is not None
        started.stdout.readline()
        [found] = Watch(mark).look()
        assert found == Process(started.pid, os.getpid(), 3)
        assert Watch(mark[:-1]).look() == []
        assert processes.with_variable(mark) == [found]
        started.kill()
        started.wait()
        assert Watch(mark).look() == []
