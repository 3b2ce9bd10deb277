"""Every item is worked on once, with any number of workers, and what goes wrong in one comes through."""

import os
import subprocess
import sys

import pytest

from engine.corpus.pool import available_cpus, workers
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


def test_ranks_that_do_not_see_each_other_are_refused():
    """As when mpi4py was built for another MPI than the launcher's: each rank would write the whole output.

    In a process of its own: MPI_Init leaves variables in the C environment, which later children would inherit.
    """
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    script = (
        "import sys\ntry:\n    from mpi4py import MPI\nexcept (ImportError, RuntimeError):\n    sys.exit(77)\n"
        "from engine.corpus.pool import workers\n"
        "with workers(1) as pool: pass\n"
    )
    environ = os.environ | {"OMPI_COMM_WORLD_SIZE": "4"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=False)
    if done.returncode == 77:
        pytest.skip("there is no MPI library")
    assert done.returncode == 1
    assert "EnvironmentProblem: the launcher started 4 ranks, but mpi4py sees a world of 1" in done.stderr


def test_there_is_a_cpu():
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
