"""Selections of tests: parts of the long matrices, how long these may be, and what runs side by side."""

from __future__ import annotations

import dataclasses
import itertools
import types
from typing import Any

import pytest

from tests import conftest


@pytest.mark.parametrize(("part", "expected"), [("1/1", (1, 1)), ("2/4", (2, 4))])
def test_a_part_of_the_matrix(part: str, expected: tuple[int, int], monkeypatch):
    monkeypatch.setenv("PART", part)
    assert conftest.part() == expected


@pytest.mark.parametrize("part", ["0/2", "3/2", "x", "1"])
def test_a_part_that_is_none_is_refused(part: str, monkeypatch):
    monkeypatch.setenv("PART", part)
    with pytest.raises(pytest.UsageError, match="allowed: i/n with 1 <= i <= n"):
        conftest.part()


@dataclasses.dataclass
class Collected:
    """What pytest knows of a test, as far as parts ask."""

    number: int
    is_long: bool
    nodeid: str = "tests/distributed/test_parity.py"

    def get_closest_marker(self, name: str) -> bool | None:
        return (name == "matrix" and self.is_long) or None


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_complete_and_of_one_size(parts: int, monkeypatch):
    collected = [Collected(number, number % 3 > 0) for number in range(100)]
    kept = []
    for number in range(1, parts + 1):
        monkeypatch.setenv("PART", f"{number}/{parts}")
        items = list(collected)
        config = types.SimpleNamespace(
            hook=types.SimpleNamespace(pytest_deselected=lambda items: None), stash=pytest.Stash()
        )
        conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        kept.append([item.number for item in items])
    assert sorted(itertools.chain.from_iterable(kept)) == list(range(100))
    long = [sum(collected[number].is_long for number in one) for one in kept]
    assert max(long) - min(long) <= 1
    assert {number for number in range(100) if not collected[number].is_long} <= set(kept[0])


def test_long_cases_are_counted_but_for_files_that_hold_no_layouts():
    whole: Any = [Collected(number, is_long=True, nodeid=f"x{number}") for number in range(3)]
    others: Any = [Collected(0, is_long=True, nodeid=f"{place}x") for place in conftest.ELSEWHERE]
    short: Any = [Collected(0, is_long=False)]
    assert conftest.long_cases([*whole, *others, *short]) == ["x0", "x1", "x2"]


def test_the_matrix_has_not_outgrown_its_time(request: pytest.FixtureRequest):
    long = request.config.stash[conftest.LONG]
    assert len(long) <= conftest.LARGEST_MATRIX, "drop cases that the covering in tests/distributed/covering.py has"


def test_tests_that_start_processes_are_two_groups_and_every_other_file_is_its_own() -> None:
    assert conftest.group_of("tests/distributed/test_parity.py") == "worlds"
    for source in ("tests/chaos/test_kills.py", "tests/bench/test_step.py", "tests/tools/test_launch.py"):
        assert conftest.group_of(source) == "commands"
    assert conftest.group_of("tests/test_conftest.py") == "tests/test_conftest.py"


def test_a_file_whose_tests_are_all_deselected_is_not_imported() -> None:
    def is_left_out(source: str, expression: str) -> bool:
        config: Any = types.SimpleNamespace(getoption=lambda name, default: expression)
        return bool(conftest.pytest_ignore_collect(conftest.REPOSITORY / source, config))

    assert is_left_out("tests/distributed/test_parity.py", "not matrix and not ranks")
    assert is_left_out("tests/tools/test_launch.py", "not ranks")
    assert is_left_out("tests/engine/serve/test_export.py", "not matrix and not slow")
    assert not is_left_out("tests/engine/serve/test_export.py", "not matrix and not ranks")
    assert not is_left_out("tests/test_conftest.py", "not matrix and not ranks")
    for expression in ("", "not matrix and not slurm", "ranks", "not ranks or matrix"):
        assert not is_left_out("tests/distributed/test_parity.py", expression)


def test_what_is_slow_is_there() -> None:
    assert [path for path in conftest.SLOW if not (conftest.REPOSITORY / path).exists()] == []
    assert [*conftest.SLOW] == sorted({*conftest.SLOW}), "each once, in order"
