"""Cores and threads of a rank: every way in which launchers bind ranks, or do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.config.rank_environment import RankEnvironment
from launcher.threads import cores_of_rank, num_threads, share_cores

BOUND = {"SLURM_CPU_BIND_TYPE": "mask_cpu:"}


def rank(local_rank: int, local_world_size: int, launcher: str) -> RankEnvironment:
    return RankEnvironment(
        local_rank, local_world_size, local_rank, local_world_size=local_world_size, launcher=launcher
    )


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "deepspeed", "local", "environment", "openmpi"])
@pytest.mark.parametrize(("ranks", "cores"), [(1, 8), (2, 8), (3, 8), (8, 8), (4, 2)])
def test_ranks_that_nobody_bound_share_the_node(launcher: str, ranks: int, cores: int) -> None:
    """No core has more ranks than it must, and none of a node with fewer ranks than cores has two."""
    shares = [cores_of_rank(rank(local, ranks, launcher), {}, list(range(cores)), cores) for local in range(ranks)]
    assert {len(share) for share in shares} == {max(cores // ranks, 1)}
    used = [core for share in shares for core in share]
    assert max(map(used.count, used)) == -(-ranks // cores)
    assert {num_threads(rank(0, ranks, launcher), {}, share) for share in shares} == {max(cores // ranks, 1)}


def test_a_job_that_has_a_part_of_the_node_shares_that_part() -> None:
    """Slurm confines a job to its cores; without --cpu-bind all tasks may use all of them."""
    assert cores_of_rank(rank(1, 4, "slurm"), {}, list(range(32, 64)), 128) == list(range(40, 48))


def test_cores_that_slurm_gave_to_the_task_are_its_own() -> None:
    assert cores_of_rank(rank(1, 4, "slurm"), BOUND, [8, 9], 128) == [8, 9]


def test_ranks_of_a_torchrun_in_a_bound_task_share_its_cores() -> None:
    assert cores_of_rank(rank(1, 4, "torchrun"), BOUND, list(range(8)), 128) == [2, 3]


@pytest.mark.parametrize(
    ("ranks", "cores", "expected"), [(2, 1, 1), (16, 16, 2), (8, 8, 4), (2, 2, 2)], ids=["core", "socket", "numa", "ht"]
)
def test_what_mpirun_bound_is_shared_by_the_ranks_that_it_bound_there(ranks: int, cores: int, expected: int) -> None:
    own = cores_of_rank(rank(0, ranks, "openmpi"), {}, list(range(cores)), 32)
    assert len(own) == expected


def test_cpus_per_task_limits_the_threads_of_a_task_that_is_not_confined() -> None:
    whole = list(range(64))
    assert num_threads(rank(0, 1, "slurm"), {"SLURM_CPUS_PER_TASK": "4"}, whole) == 4
    assert num_threads(rank(0, 1, "slurm"), {"SLURM_CPUS_PER_TASK": "400"}, whole) == 64
    assert num_threads(rank(0, 1, "torchrun"), {"SLURM_CPUS_PER_TASK": "4"}, whole) == 64


def test_what_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    environ = {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "close"}
    share_cores(rank(1, 2, "slurm"), environ, on_gpu=False)
    assert environ == {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "close"}
    assert bound == []
    share_cores(rank(1, 2, "slurm"), environ := {}, on_gpu=True)
    assert (environ, bound) == ({"OMP_NUM_THREADS": "2"}, [])
    share_cores(rank(1, 2, "slurm"), environ := {}, on_gpu=False)
    assert (environ, bound) == ({"OMP_NUM_THREADS": "2"}, [[2, 3]])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_torch_takes_the_threads_and_the_cores() -> None:
    program = (
        "import os; from launcher.threads import share_cores; from tests.launcher.test_threads import rank\n"
        "share_cores(rank(1, len(os.sched_getaffinity(0)), 'slurm'), os.environ, on_gpu=False)\n"
        "import torch, threading; found = []\n"
        "def look(): found.append(os.sched_getaffinity(0))\n"
        "thread = threading.Thread(target=look); thread.start(); thread.join()\n"
        "print(torch.get_num_threads(), len(found[0]))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"
