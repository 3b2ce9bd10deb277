"""Choice of the world in which a run goes on after a loss: the largest valid one on the ranks that remain."""

from __future__ import annotations

from engine.config.schema.run import RunConfig
from engine.plan.elastic import World, describe, elastic_worlds
from engine.plan.hardware import ACCELERATORS, Accelerator, Cluster
from engine.plan.ranking import rank
from engine.plan.worlds import with_parallel

UNKNOWN = ACCELERATORS["a100-80gb"]
"""Stands for accelerators that no table knows: layouts are only compared with each other."""


def world_for(
    config: RunConfig, num_ranks: int, accelerator: Accelerator = UNKNOWN, per_node: int | None = None
) -> World | None:
    """Return the best world of at most `num_ranks` ranks for a run to go on in, or None.

    The largest one, by the data axis alone. With `elastic.layout: any` the largest in which any layout is valid, and
    of those the first in the plan's ranking for the accelerator. With `per_node` the ranks are those of whole nodes;
    None means that all are on one node, and any number of them will do.
    """
    multiple = per_node or 1
    if config.elastic.layout == "data":
        worlds = [world for world in elastic_worlds(config, num_ranks) if world.size % multiple == 0]
        return worlds[-1] if worlds else None
    for size in range(num_ranks - num_ranks % multiple, 0, -multiple):
        # On one node all ranks share its links.
        ranked = rank(config, Cluster(accelerator, size, per_node=per_node or size))
        if ranked:
            return describe(with_parallel(config, **ranked[0].parallel.model_dump()), ranked[0].layout)
    return None
