"""Fail on every rank or on none."""

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.parallel.agreement import on_all, on_first
from engine.parallel.groups import ALONE, Group
from tests.engine.checkpoint.threads import ThreadedRanks


def group(rank):
    return Group((0, 1, 2), rank)


def test_results_stay_where_they_are_or_come_from_the_first(monkeypatch):
    ranks = ThreadedRanks(monkeypatch)
    assert ranks.run(3, lambda rank: on_all(lambda: rank * 10, group(rank), CheckpointError)) == [0, 10, 20]
    assert ranks.run(3, lambda rank: on_first(lambda: rank + 7, group(rank), CheckpointError)) == [7, 7, 7]


def test_one_error_is_everybodys_with_its_three_parts(monkeypatch):
    def fail(rank):
        if rank:
            raise ConfigError(f"wrong {rank}", "allowed", "remedy")

    errors = ThreadedRanks(monkeypatch).run(3, lambda rank: on_all(lambda: fail(rank), group(rank), CheckpointError))
    assert {type(error) for error in errors} == {ConfigError}
    assert {(error.wrong, error.allowed, error.remedy) for error in errors} == {
        ("rank 1: wrong 1", "allowed", "remedy")
    }


def test_an_error_of_the_first_is_everybodys(monkeypatch):
    def fail(rank):
        raise KeyError(rank)

    errors = ThreadedRanks(monkeypatch).run(3, lambda rank: on_first(lambda: fail(rank), group(rank), CheckpointError))
    assert {str(error) for error in errors} == {"rank 0: KeyError: 0"}
    assert isinstance(errors[0].__cause__, KeyError)


def test_alone_no_rank_is_named():
    with pytest.raises(CheckpointError, match=r"^ZeroDivisionError: "):
        on_all(lambda: 1 // 0, ALONE, CheckpointError)
