"""Choice of the world in which a run goes on after a loss: the largest valid one on the ranks that remain."""

from __future__ import annotations

from engine.config.schema.run import RunConfig
from engine.plan.elastic import World, describe, elastic_worlds
from engine.plan.hardware import ACCELERATORS, Accelerator, Cluster
from engine.plan.ranking import rank
from engine.plan.worlds import with_parallel

UNKNOWN = ACCELERATORS["a100-80gb"]
"""Stands for accelerators that no table knows: layouts are only compared with each other."""


def world_for(config: RunConfig, num_ranks: int, accelerator: Accelerator = UNKNOWN) -> World | None:
    """Return the best world of at most `num_ranks` ranks (all on one node) for a run to go on in, or None.

    The largest one, by the data axis alone. With `elastic.layout: any` the largest in which any layout is valid, and
    of those the first in the plan's ranking for the accelerator.
    """
    if config.elastic.layout == "data":
        worlds = elastic_worlds(config, num_ranks)
        return worlds[-1] if worlds else None
    for size in range(num_ranks, 0, -1):
        # A restart stays on one node (`launcher.restarts`), so all ranks share its links.
        ranked = rank(config, Cluster(accelerator, size, per_node=size))
        if ranked:
            return describe(with_parallel(config, **ranked[0].parallel.model_dump()), ranked[0].layout)
    return None
