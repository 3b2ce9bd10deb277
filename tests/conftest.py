"""A whole run of the tests: which of them start processes, how long the matrices may be, and the parity table.

Tests side by side (pytest-xdist): a file's tests stay on one worker, in order, so that what they share is made once.
Tests that start processes are two groups, each on one worker from the beginning: so at most two of them run at a time,
however many cores there are, and the pure ones fill what is left.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.logs import ROOT
from launcher.signals import FORWARDED
from tests.sources import imports

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "build"
TABLE = pytest.StashKey[Path]()
LONG = pytest.StashKey[list[str]]()
LARGEST_MATRIX = 256
"""Long cases of what a layout computes and costs; the files below hold those of checkpoints, kills, loss and speed."""
ELSEWHERE = (
    "tests/bench/",
    "tests/chaos/",
    "tests/distributed/test_interchange.py",
    "tests/distributed/test_resharding.py",
    "tests/distributed/test_universal.py",
    "tests/engine/checkpoint/",
    "tests/slurm/",
)


STARTS_PROCESSES = ("tests/bench/", "tests/chaos/", "tests/distributed/", "tests/slurm/")
"""Folders whose every test is marked `ranks`; others are by what their module imports."""
SLURM = "tests/slurm/"
"""Folder whose every test is marked `slurm`, and runs on a cluster of its own."""
SLOW = tuple(
    line for line in (Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
)
"""Files and folders whose every test is marked `slow`."""
SERVERS = ("subprocess", "multiprocessing", "tests.distributed.ranks", "tests.engine.data.rank")
"""Modules from which a test that starts processes imports something."""


def part() -> tuple[int, int]:
    """(i, n) of the environment's PART=i/n: this run does every n-th case of the long matrices, and part 1 the rest."""
    text = os.environ.get("PART", "1/1")
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, parts = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise pytest.UsageError(f"PART = {text!r}; allowed: i/n with 1 <= i <= n; for example PART=2/4 make test-all")
    return number, parts


def long_cases(items: list[pytest.Item]) -> list[str]:
    """Return the ids of the long cases that `LARGEST_MATRIX` counts."""
    long = (item.nodeid for item in items if item.get_closest_marker("matrix"))
    return [name for name in long if not name.startswith(ELSEWHERE)]


def pytest_configure(config: pytest.Config) -> None:
    """Hear Ctrl-C, which a shell without job control ignores for what it starts in the background: children, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@cache
def starts_processes(source: str) -> bool:
    """Return True if a test file's folder or its imports say that it starts processes; `source` is below the root."""
    if source.startswith(STARTS_PROCESSES):
        return True
    return any(name.startswith(SERVERS) for name in imports(source))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files whose tests are all deselected by `not ranks` or `not slow` (`make fast`): importing them takes
    longer than many a test."""
    expression = str(config.getoption("markexpr", "") or "")
    if collection_path.suffix != ".py" or " or " in expression:
        return None
    source = str(collection_path.relative_to(REPOSITORY))
    if "not slow" in expression and source.startswith(SLOW):
        return True
    return ("not ranks" in expression and starts_processes(source)) or None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that starts processes as `ranks`, and one that takes seconds without them as `slow`."""
    if starts_processes(source_of(item.nodeid)):
        item.add_marker(pytest.mark.ranks)
    if item.nodeid.startswith(SLOW):
        item.add_marker(pytest.mark.slow)
    if item.nodeid.startswith(SLURM):
        item.add_marker(pytest.mark.slurm)


def source_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that gives a file's tests to one worker, and those that start processes to two.

    Its own `--dist loadgroup` does this by rewriting test ids, which pytest 9.2 no longer lets it do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(source_of(nodeid))

    config.option.loadscopereorder = False  # in order of collection both groups of processes come first
    return Scheduler(config, log)


def group_of(source: str) -> str:
    """Return the tests that a test file runs in one worker with: its own, or one of two groups that start processes.

    The worlds of tests/distributed are one group; the other takes about as long.
    """
    if not starts_processes(source) or source.startswith(SLURM):
        return source
    return "worlds" if source.startswith("tests/distributed/") else "commands"


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Leave the package's logger, the environment and handlers of signals as they were: commands that tests run in this
    process set all three."""
    root, environment = logging.getLogger(ROOT), dict(os.environ)
    handled = {number: signal.getsignal(number) for number in FORWARDED}
    handlers, level, propagate = [*root.handlers], root.level, root.propagate
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    root.propagate = propagate
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(environment)
    for number, handler in handled.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer and the token shards of `run_tree`, written once; do not change them."""
    from tests.distributed.runs import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def heard_hangup() -> Iterator[None]:
    """SIGHUP with its default meaning in this process and those that it starts, also where pytest runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[LONG] = long_cases(items)  # of all that was collected; tests/test_conftest.py compares
    number, parts = part()
    kept, dropped, long = [], [], 0
    for item in items:
        mine = number == 1
        if item.get_closest_marker("matrix"):
            mine = long % parts == number - 1
            long += 1
        (kept if mine else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the parity table, in the process that ran its cases."""
    table = sys.modules.get("tests.distributed.table")
    if table is None or not table.ROWS:
        return
    number, parts = part()
    path = FOLDER / ("parity.md" if parts == 1 else f"parity-{number}-of-{parts}.md")
    path.parent.mkdir(exist_ok=True)
    path.write_text(table.markdown(table.ROWS), encoding="utf-8")
    session.config.stash[TABLE] = path
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["parity table"] = str(path)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker wrote."""
    if path := getattr(node, "workeroutput", {}).get("parity table"):
        node.config.stash[TABLE] = Path(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if path := config.stash.get(TABLE, None):
        terminalreporter.write_line(f"parity table: {path}")
