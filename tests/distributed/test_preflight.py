"""`palimpsest preflight` on several ranks, and the bandwidths between nodes of which each is a rank."""

from typing import Any

import torch

from engine.config.rank_environment import RankEnvironment
from engine.parallel.bandwidth import all_reduce_bandwidth, pair_bandwidths
from engine.parallel.groups import Group
from tests.distributed.ranks import run_commands, run_ranks


def measure(environment: RankEnvironment) -> Any:
    world, cpu = Group(tuple(range(environment.world_size)), environment.global_rank), torch.device("cpu")
    return pair_bandwidths([0, 1, 2], world, cpu, 1 << 16), all_reduce_bandwidth(world, cpu, 1 << 16)


def test_every_pair_of_nodes_is_measured_and_all_ranks_know_it() -> None:
    found = run_ranks(3, measure)
    assert all(each == found[0] for each in found)
    pairs, bus = found[0]
    assert sorted(pairs) == ["0-1", "0-2", "1-2"]
    assert all(value > 0 for value in (*pairs.values(), bus))


def test_the_command_meets_and_ends_well() -> None:
    assert [code for code, _ in run_commands(2, "preflight", "--json")] == [0, 0]
