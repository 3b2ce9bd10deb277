"""Nodes and world of an attempt: the largest valid world on whole live nodes, without suspicious ones if possible."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from launcher.slurm.placement import place, usable_nodes, valid_nodes
from tests.launcher.slurm.specs import run

NODES = ["n1", "n2", "n3", "n4"]


def test_all_nodes_where_they_make_a_world() -> None:
    found = place(run(), NODES, (), 1, 2)
    assert found is not None
    assert (found.nodes, found.world.size, found.spare) == (tuple(NODES), 8, ())


def test_a_node_that_the_batch_does_not_need_is_spare() -> None:
    """A batch of 16 on 3 nodes of 2 ranks: 6 data ranks do not divide it, 4 do."""
    found = place(run(), NODES[:3], (), 1, 2)
    assert found is not None
    assert (found.nodes, found.world.size, found.spare) == (("n1", "n2"), 4, ("n3",))


def test_padding_makes_three_nodes_valid() -> None:
    found = place(run(elastic={"pad_batch": True}), NODES[:3], (), 1, 2)
    assert found is not None
    assert found.world.size == 6


def test_a_suspicious_node_is_left_out() -> None:
    found = place(run(), NODES, {"n2"}, 1, 2)
    assert found is not None
    assert (found.nodes, found.spare) == (("n1", "n3"), ("n2", "n4"))


def test_a_suspicious_node_is_used_where_there_is_no_other() -> None:
    found = place(run(), NODES[:2], {"n2"}, 2, 2)
    assert found is not None
    assert found.nodes == ("n1", "n2")


@pytest.mark.parametrize(("live", "min_nodes"), [([], 1), (["n1"], 2)])
def test_too_few_nodes(live: list[str], min_nodes: int) -> None:
    assert place(run(), live, (), min_nodes, 2) is None


def test_ranks_of_a_node_stay_together() -> None:
    """Pipelines of 4 on nodes of 2: a world of one node is none."""
    deep = run(parallel={"pipe": 4})
    assert place(deep, NODES[:1], (), 1, 2) is None
    found = place(deep, NODES[:3], (), 1, 2)
    assert found is not None
    assert found.nodes == ("n1", "n2")
    assert valid_nodes(deep, 4, 2) == [2, 4]


def test_any_layout() -> None:
    free = run(elastic={"layout": "any"}, parallel={"pipe": 4})
    found = place(free, NODES[:1], (), 1, 2)
    assert found is not None
    assert found.world.size == 2


def test_ranges_without_a_valid_world_name_those_that_are() -> None:
    assert usable_nodes(run(), 2, 4, 2) == [2, 4]
    with pytest.raises(ConfigError) as caught:
        usable_nodes(run(), 3, 3, 2)
    assert caught.value.wrong.startswith("--nodes = 3 with 2 ranks each")
    assert caught.value.allowed == "nodes: 1, 2, 4"
