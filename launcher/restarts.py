"""The choice of another attempt after a failure, and of its ranks. Pure.

Killed and hanging ranks are lost: their devices are not used again. An exception loses no rank. Two failures of the
same cause at the same step are one that would come a third time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config.schema.run import RunConfig
from engine.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USAGE
from engine.plan.elastic import World
from engine.plan.hardware import Accelerator
from engine.plan.shrink import UNKNOWN, world_for
from launcher.commands import Node, Wanted
from launcher.verdict import Verdict


@dataclass
class Restarts:
    """Count of the restarts of one launch, at most `limit`, and the failure before the newest one."""

    limit: int
    used: int = 0
    _last: tuple[int, str] | None = None

    def refusal(self, verdict: Verdict) -> str | None:
        """Return the reason for no further attempt, as text; None where there is one, which is then counted."""
        if verdict.code in (EXIT_DONE, EXIT_REQUEUE):
            return ""
        if verdict.code == EXIT_USAGE or self.limit == 0:
            return "not restarted" if self.limit else ""
        if verdict.stopping:
            return "not restarted: it was asked to stop"
        # Step and cause, without ranks: a bad sample fails at its step wherever it is trained, a bad device does not.
        failure = (verdict.step, verdict.cause)
        if failure == self._last:
            return f"not restarted: step {verdict.step} has failed twice in the same way, and would again"
        if self.used == self.limit:
            return f"not restarted: all {self.limit} restarts are used up"
        self._last = failure
        self.used += 1
        return None


def next_attempt(
    run: RunConfig,
    asked: tuple[str, ...],
    wanted: Wanted,
    node: Node,
    verdict: Verdict,
    master_port: int,
    accelerator: Accelerator | None = None,
) -> tuple[Wanted, Node, World | None]:
    """Return what to start after `wanted` has failed on its only node: the same, or less by the ranks that were lost.

    `asked` are the user's own overrides, which are in `run`. The world is None where it stays: where no rank was lost,
    and where no smaller world is valid. `accelerator` is the GPUs' kind, where it is known.
    """
    again = replace(wanted, attempt=wanted.attempt + 1, master_port=master_port)
    if not verdict.lost:
        return again, node, None
    world = world_for(run, wanted.world_size - len(verdict.lost), accelerator or UNKNOWN)
    if world is None:
        return again, node, None
    remaining = [device for rank, device in zip(node.ranks, node.devices, strict=False) if rank not in verdict.lost]
    # From the user's overrides and not from the last attempt's, whose layout was for a larger world; later ones win.
    again = replace(again, world_size=world.size, overrides=(*asked, *world.overrides(run)))
    # Ranks are numbered anew from 0; a world may be smaller than the ranks that remain, and leave some devices idle.
    return again, replace(node, ranks=range(world.size), devices=tuple(remaining[: world.size])), world
