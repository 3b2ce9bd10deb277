"""What concerns a whole run of the tests: how long the matrices may be, a part of them only, and the parity table."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.logs import ROOT

FOLDER = Path(__file__).parents[1] / "build"
LARGEST_MATRIX = 150
"""Long cases of what a layout computes and costs; the files below hold the long ones of checkpoints, kills and loss."""
ELSEWHERE = (
    "tests/chaos/",
    "tests/distributed/test_interchange.py",
    "tests/distributed/test_resharding.py",
    "tests/distributed/test_universal.py",
)


def part() -> tuple[int, int]:
    """(i, n) of the environment's PART=i/n: this run does every n-th case of the long matrices, and part 1 the rest."""
    text = os.environ.get("PART", "1/1")
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, parts = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise pytest.UsageError(f"PART = {text!r}; allowed: i/n with 1 <= i <= n; for example PART=2/4 make test-all")
    return number, parts


def check_matrix(items: list[pytest.Item]) -> None:
    """Refuses a matrix of layouts that has outgrown `make test-all`.

    Raises:
        UsageError: it has more than `LARGEST_MATRIX` cases.
    """
    long = [item for item in items if item.get_closest_marker("matrix") and not item.nodeid.startswith(ELSEWHERE)]
    if len(long) > LARGEST_MATRIX:
        raise pytest.UsageError(
            f"{len(long)} cases are marked `matrix`; allowed: {LARGEST_MATRIX}; drop those that the covering in "
            "tests/distributed/covering.py has"
        )


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Leave the package's logger and the environment as they were: commands that tests run in this process set both."""
    root, environment = logging.getLogger(ROOT), dict(os.environ)
    handlers, level, propagate = [*root.handlers], root.level, root.propagate
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    root.propagate = propagate
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(environment)


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
    check_matrix(items)
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = sys.modules.get("tests.distributed.table")
    if table is None or not table.ROWS:
        return
    number, parts = part()
    path = FOLDER / ("parity.md" if parts == 1 else f"parity-{number}-of-{parts}.md")
    path.parent.mkdir(exist_ok=True)
    path.write_text(table.markdown(table.ROWS), encoding="utf-8")
    terminalreporter.write_line(f"parity table: {path}")
