"""The nodes and the world of an attempt, chosen from the nodes that live: whole nodes, bad ones left out. Pure.

The largest valid world on the live nodes is taken; nodes that it does not need are spare. A node whose rank was killed
or hung is left out where the rest makes a valid world of no fewer nodes than the job asked for, and used again where it
does not. A node that is lost is never used again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.config.resolve import check
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError, report
from engine.plan.elastic import World
from engine.plan.frozen import check_patterns
from engine.plan.hardware import Accelerator
from engine.plan.shrink import UNKNOWN, world_for


@dataclass(frozen=True)
class Placement:
    """Nodes of an attempt, in Slurm's order, and its world."""

    nodes: tuple[str, ...]
    world: World
    spare: tuple[str, ...]
    """Live nodes that the world does not use."""


def place(
    run: RunConfig,
    live: Sequence[str],
    suspicious: Collection[str],
    min_nodes: int,
    per_node: int,
    accelerator: Accelerator | None = None,
) -> Placement | None:
    """Return the placement on the live nodes, or None where they make no valid world of `min_nodes` or more.

    `suspicious` are nodes that held a rank which was killed or hung.
    """
    trusted = [name for name in live if name not in suspicious]
    for candidates in (trusted, list(live)):
        world = world_for(run, len(candidates) * per_node, accelerator or UNKNOWN, per_node) if candidates else None
        if world is not None and (num_nodes := world.size // per_node) >= min_nodes:
            used = tuple(candidates[:num_nodes])
            return Placement(used, world, tuple(name for name in live if name not in used))
    return None


def valid_nodes(run: RunConfig, most: int, per_node: int) -> list[int]:
    """Return the numbers of nodes, up to `most`, that make a valid world with every one of them in use."""
    found = [world_for(run, num_nodes * per_node, UNKNOWN, per_node) for num_nodes in range(1, most + 1)]
    return [number for number, world in enumerate(found, start=1) if world and world.size == number * per_node]


def usable_nodes(run: RunConfig, min_nodes: int, max_nodes: int, per_node: int) -> list[int]:
    """Return the valid numbers of nodes within the range that a job asks for.

    Raises:
        ConfigError: there is none, or the run starts on no number of nodes at all; the second says why.
    """
    cannot = "this run cannot start on any number of nodes"
    if problems := check_patterns(run):
        raise report(problems, cannot)
    valid = [number for number in valid_nodes(run, max_nodes, per_node) if number >= min_nodes]
    if not valid:
        # Some more than were asked for: the batch may need a few nodes more, or fewer.
        others = valid_nodes(run, 2 * max_nodes, per_node)
        if not others and (problems := check(run)):
            raise report(problems, cannot)
        nodes = str(min_nodes) if min_nodes == max_nodes else f"{min_nodes}-{max_nodes}"
        raise ConfigError(
            f"--nodes = {nodes} with {per_node} ranks each make no world in which this run can start",
            f"nodes: {', '.join(map(str, others)) or f'none up to {2 * max_nodes}'}",
            "ask for these, set elastic.layout: any or elastic.pad_batch: true, or see `palimpsest plan` for layouts",
        )
    return valid
