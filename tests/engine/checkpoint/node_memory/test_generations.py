"""Which nodes a generation outlives, and what goes where: every set of lost nodes, against the closed form."""

from __future__ import annotations

import itertools
import random

import pytest

from engine.checkpoint.node_memory.generations import Generation, deliveries, lost, newest_first


def held_by(count: int) -> list[set[str]]:
    """Each node has its own two files and those of the node before it."""
    return [{f"{node}.{number}" for node in {at, (at - 1) % count} for number in range(2)} for at in range(count)]


@pytest.mark.parametrize("count", range(1, 9))
def test_a_generation_outlives_every_loss_but_of_two_nodes_side_by_side(count):
    files = sorted(set().union(*held_by(count)))
    for gone in itertools.product((False, True), repeat=count):
        held = [set() if away else own for away, own in zip(gone, held_by(count), strict=True)]
        side_by_side = any(gone[at] and gone[(at + 1) % count] for at in range(count))
        assert bool(lost(files, held)) == side_by_side, gone
        if side_by_side:
            ends = {f"{at}.{number}" for at in range(count) if gone[at] and gone[(at + 1) % count] for number in (0, 1)}
            assert set(lost(files, held)) == ends


@pytest.mark.parametrize("seed", range(50))
def test_deliveries_bring_everybody_what_is_needed_and_nothing_else(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    files = [f"file-{number}" for number in range(draw.randint(1, 20))]
    held = [set(draw.sample(files, draw.randint(0, len(files)))) for _ in range(count)]
    held[draw.randrange(count)] |= set(lost(files, held))
    needed = [set(draw.sample(files, draw.randint(0, len(files)))) for _ in range(count)]
    there = [set(own) for own in held]
    for delivery in deliveries(needed, held):
        assert delivery.file in held[delivery.source], "given by who has it from the start"
        assert delivery.file not in there[delivery.target], "brought once, and not to who has it"
        there[delivery.target].add(delivery.file)
    assert there == [own | wanted for own, wanted in zip(held, needed, strict=True)]


def test_who_has_the_same_files_shares_the_work():
    files = {f"file-{number}" for number in range(12)}
    plan = deliveries([set(), set(), set(), files], [files, files, files, set()])
    assert sorted(delivery.source for delivery in plan) == [0] * 4 + [1] * 4 + [2] * 4


def test_newer_steps_come_first_and_of_one_step_the_later_attempt():
    held = [{Generation(4, 0, "f"), Generation(6, 0, "a")}, {Generation(6, 1, "0")}, set(), {Generation(4, 0, "f")}]
    assert newest_first(held) == [Generation(6, 1, "0"), Generation(6, 0, "a"), Generation(4, 0, "f")]
    assert newest_first([set(), set()]) == []
