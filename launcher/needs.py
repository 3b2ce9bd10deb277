"""Demands of a run on each of its nodes, from its plan, by which `launcher.preflight` judges them."""

from __future__ import annotations

from dataclasses import replace

from engine.config.schema.run import RunConfig
from engine.plan.cost import checkpoint_bytes
from engine.plan.plan import make_plan
from launcher.node_checks import Needs


def needs_of(run: RunConfig, world_size: int, plain: Needs) -> Needs:
    """Return the demands of a run in a world of so many ranks, of which a node holds `plain.ranks`."""
    plan = make_plan(run, world_size)
    kept = run.checkpoint.keep_last + run.checkpoint.keep_best + 1
    on_host = max(stage.memory.host + stage.stored_bytes for stage in plan.stages)
    memory = run.checkpoint.memory
    return replace(
        plain,
        folder=run.folder,
        disk_bytes=kept * checkpoint_bytes(run),
        host_bytes=plain.ranks * on_host,
        shared=memory.folder if memory is not None else plain.shared,
        shared_bytes=plan.node_memory_bytes(plain.ranks) if memory is not None else 0,
    )
