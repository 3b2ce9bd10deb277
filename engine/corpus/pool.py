"""Functions run over many items at once: in this process, in worker processes, or on the ranks of an MPI world.

Only a few items per worker are under way at once, so memory does not grow with their number. Results come as they are
finished, in no order: what must not depend on the number of workers carries its place along.
Under `mpirun` or `srun` the first rank reads, decides and hands out; the others work (through mpi4py.futures).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from engine.errors import ConfigError, EnvironmentProblem

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_PER_WORKER = 3  # one in work, and two that wait while this process reads the next
_WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which MPI's launchers say how many ranks there are."""


@dataclass(frozen=True)
class Pool:
    """Workers; `executor` is None where the work is done in this process."""

    workers: int
    executor: Executor | Any = None

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function` of each item, in the order in which they finish.

        Raises what reading `items` or the function raises, and `EnvironmentProblem` where a worker process died.
        """
        if self.executor is None:
            yield from map(function, items)
            return
        waiting: set[Future[Result]] = set()
        try:
            for item in items:
                waiting.add(self.executor.submit(function, item))
                while len(waiting) >= _ITEMS_PER_WORKER * self.workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "a worker process died, perhaps for lack of memory",
                "0.5 GiB for each worker, 1 GiB where documents are very short, 0.5 KiB for each token of a long one",
                "start again with fewer --workers: what is finished is kept",
            ) from error
        finally:
            # also where the consumer stops early: nothing that is queued begins any more
            for future in waiting:
                future.cancel()


@contextmanager
def workers(count: int) -> Iterator[Pool | None]:
    """Yield a pool of `count` processes, or of all ranks but the first of an MPI world.

    None on the other ranks of such a world, once the first one has ended: there is nothing left to do there.
    Raises `ConfigError` for fewer than one, `EnvironmentProblem` where MPI cannot be used.
    """
    if count < 1:
        raise ConfigError(f"--workers {count}", "1 or more", "leave it out for one per CPU")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread per worker: they are the parallelism
    if (world_size := _world_size()) > 1:
        with _ranks(world_size) as pool:
            yield pool
    elif count == 1:
        yield Pool(1)
    else:
        # spawned, not forked: the tokenizer's own threads do not survive a fork
        executor = ProcessPoolExecutor(count, mp_context=_Context(), initializer=_start_worker)
        try:
            yield Pool(count, executor)
        finally:
            executor.shutdown(cancel_futures=True)


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _world_size() -> int:
    """Return the number of ranks of the MPI world that this process was started in; 1 outside of one."""
    sizes = [int(os.environ[name]) for name in _WORLD_SIZES if os.environ.get(name, "").isdigit()]
    return max(sizes, default=1)


@contextmanager
def _ranks(world_size: int) -> Iterator[Pool | None]:
    try:
        from mpi4py import MPI  # pyright: ignore[reportMissingImports]  # an extra
        from mpi4py.futures import MPICommExecutor  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise EnvironmentProblem(
            f"this is one of {world_size} MPI ranks, but mpi4py cannot be used: {error}",
            "mpi4py and the MPI library that started the ranks",
            "pip install 'palimpsest[mpi]', or start one process with --workers",
        ) from error
    found = MPI.COMM_WORLD.Get_size()
    if found != world_size:
        raise EnvironmentProblem(
            f"the launcher started {world_size} ranks, but mpi4py sees a world of {found}",
            "an mpi4py that was built for the launcher's MPI library",
            "load the module of that library, or start one process with --workers",
        )
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Pool(world_size - 1, executor)


class _Worker(SpawnProcess):
    def start(self) -> None:
        """Start with SIGINT blocked, which a process inherits: Ctrl-C while it imports must not print a traceback."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Worker


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once its parent has ended: a parent that was killed cannot end its workers."""
    parent: Any = multiprocessing.parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)  # sys.exit would end this thread alone
