"""Errors in three parts, and reports of several."""

import pickle

import pytest

from engine.errors import (
    EXIT_FAILURE,
    EXIT_USAGE,
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    PalimpsestError,
    report,
)


def test_three_parts_are_three_lines() -> None:
    error = ConfigError("parallel.tensor = 3", "1, 2, 4", "change it")
    assert str(error) == "parallel.tensor = 3\n  allowed: 1, 2, 4\n  to do: change it"
    assert str(ConfigError("parallel.tensor = 3", remedy="change it")) == "parallel.tensor = 3\n  to do: change it"
    assert str(ConfigError("parallel.tensor = 3")) == "parallel.tensor = 3"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, EXIT_USAGE),
        (DataError, EXIT_FAILURE),
        (CheckpointError, EXIT_FAILURE),
        (EnvironmentProblem, EXIT_FAILURE),
    ],
)
def test_the_class_carries_the_exit_code(kind: type[PalimpsestError], code: int) -> None:
    assert kind("x").exit_code == code


def test_errors_cross_processes() -> None:
    error = DataError("wrong", "allowed", "remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert (again.wrong, again.allowed, again.remedy, str(again)) == ("wrong", "allowed", "remedy", str(error))


def test_a_report_of_one_problem_is_that_problem() -> None:
    error = report([ConfigError("a = 1", "2", "set 2")], "configuration x.yaml")
    assert str(error) == "configuration x.yaml: a = 1\n  allowed: 2\n  to do: set 2"


def test_a_report_numbers_its_problems() -> None:
    error = report([ConfigError("a = 1", "2"), DataError("b", remedy="mend b")], "run")
    assert str(error) == "run: 2 problems\n1. a = 1\n     allowed: 2\n2. b\n     to do: mend b"
    assert error.exit_code == EXIT_USAGE
