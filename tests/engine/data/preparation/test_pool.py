"""Every item is worked on once, with any number of workers, and what goes wrong in one comes through."""

import os

import pytest

from engine.data.preparation.pool import available_cpus, workers
from engine.errors import ConfigError, DataError, EnvironmentProblem


def double(number: int) -> int:
    if number < 0:
        raise DataError("wrong", "allowed", "remedy")
    return 2 * number


def die(_: int) -> int:
    os._exit(1)


def run(count, function, items):
    with workers(count) as pool:
        assert pool is not None
        return list(pool.run(function, items))


@pytest.mark.parametrize("count", [1, 2])
def test_every_item_once_and_only_a_few_read_ahead(count):
    read = []

    def items():
        for number in range(50):
            read.append(number)
            yield number

    with workers(count) as pool:
        assert pool is not None
        results = pool.run(double, items())
        first = next(results)
        assert len(read) <= 3 * count
        assert sorted([first, *results]) == list(range(0, 100, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_through_whole(count):
    with pytest.raises(DataError, match="wrong") as caught:
        run(count, double, [1, -1, 2])
    assert caught.value.remedy == "remedy"


def test_a_worker_that_dies_is_told():
    with pytest.raises(EnvironmentProblem, match="a worker process died") as caught:
        run(2, die, [1])
    assert "fewer --workers" in str(caught.value)


def test_no_workers_are_refused():
    with pytest.raises(ConfigError, match="--workers 0"):
        run(0, double, [1])


def test_ranks_that_do_not_see_each_other_are_refused(monkeypatch):
    """As when mpi4py was built for another MPI than the launcher's: each rank would write the whole output."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    try:
        from mpi4py import MPI  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError):
        pytest.skip("there is no MPI library")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(EnvironmentProblem, match="started 4 ranks, but mpi4py sees a world of 1"):
        run(1, double, [1])


def test_there_is_a_cpu():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
