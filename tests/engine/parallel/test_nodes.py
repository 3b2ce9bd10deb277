"""Nodes as a ring: every rank is on one node, and every file has one keeper, on the next node."""

from __future__ import annotations

import random

import pytest

from engine.parallel.nodes import Nodes


def worlds():
    """Nodes of equal and unequal sizes, their ranks in blocks, in turn and shuffled."""
    draw = random.Random(0)
    for sizes in ((1,), (4,), (2, 2), (1, 3), (3, 1), (8, 8, 8), (2, 1, 3, 2), (5, 5, 4)):
        names = [number for number, size in enumerate(sizes) for _ in range(size)]
        yield names
        yield [name for turn in range(max(sizes)) for name, size in enumerate(sizes) if turn < size]
        yield draw.sample(names, len(names))


@pytest.mark.parametrize("names", list(worlds()), ids=str)
def test_every_file_has_one_keeper_on_the_next_node(names):
    nodes = Nodes.of([(f"host-{name}", 0) for name in names])
    assert sorted(rank for node in nodes.ranks for rank in node) == list(range(len(names)))
    for rank, name in enumerate(names):
        assert {names[other] for other in nodes.ranks[nodes.node_of(rank)]} == {name}
    if nodes.count == 1:
        assert all(nodes.keeper_of(rank) is None and nodes.kept_by(rank) == [] for rank in range(len(names)))
        return
    kept = [(other, rank) for rank in range(len(names)) for other in nodes.kept_by(rank)]
    assert sorted(other for other, _ in kept) == list(range(len(names)))
    for other, rank in kept:
        assert nodes.node_of(rank) == (nodes.node_of(other) + 1) % nodes.count
        line = nodes.lines()[nodes.position(other)]
        assert {other, rank} <= set(line), "a file travels along a line that both are in"
    for node in nodes.ranks:
        loads = [len(nodes.kept_by(rank)) for rank in node]
        assert max(loads) - min(loads) <= 1, "the ranks of a node share what it keeps"


@pytest.mark.parametrize("names", list(worlds()), ids=str)
def test_a_line_has_one_rank_of_each_node(names):
    nodes = Nodes.of([(f"host-{name}", 0) for name in names])
    for line in nodes.lines():
        assert [nodes.node_of(rank) for rank in line] == list(range(nodes.count))
    used = nodes.lines()[: min(map(len, nodes.ranks))]
    assert len({rank for line in used for rank in line}) == sum(map(len, used)), "the first lines share no rank"


def test_a_node_is_told_by_host_and_by_number():
    unnumbered = Nodes.of([("a", 0), ("a", 0), ("b", 0), ("b", 0)])
    assert unnumbered.ranks == ((0, 1), (2, 3))
    assert unnumbered.on_host == (0, 0)
    played = Nodes.of([("a", 0), ("a", 1), ("b", 2), ("a", 0)])
    assert played.ranks == ((0, 3), (1,), (2,))
    assert played.on_host == (0, 1, 0)
    assert played.first_ranks == (0, 1, 2)


def test_groups_on_several_nodes_are_found():
    tensor = [(0, 1), (2, 3)]
    assert Nodes.of([("a", 0), ("a", 0), ("b", 1), ("b", 1)]).split(tensor) == []
    cyclic = Nodes.of([("a", 0), ("b", 1), ("a", 0), ("b", 1)])
    assert cyclic.split(tensor) == tensor, "srun -m cyclic"
    assert cyclic.split([(0,), (1,)]) == []
