"""Nodes of a world: the ranks of each, and the rank of the next node that keeps a copy of a rank's file. Pure.

A node is identified by its host and by the launcher's node number together: either alone would join what is apart
(launchers that number no nodes; several nodes that are simulated on one machine). The nodes form a ring, in the order
of their first ranks. Ranks of one `line`, one per node, pass files on along the ring; a node with fewer ranks than
another is in several lines with the same rank.

Nodes (0, 1, 2) and (3, 4) have the lines (0, 3), (1, 4) and (2, 3): rank 3 keeps copies for 0 and 2, rank 2 for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Nodes:
    """The nodes of a world. `ranks` are global ranks by node, ascending; every rank is in one node."""

    ranks: tuple[tuple[int, ...], ...]
    on_host: tuple[int, ...]
    """Number of earlier nodes on the same host, for each node: 0 on a real cluster."""

    @classmethod
    def of(cls, identities: Sequence[tuple[str, int]]) -> Nodes:
        """Group the ranks into nodes, from each global rank's (host, node rank)."""
        found: dict[tuple[str, int], list[int]] = {}
        for global_rank, identity in enumerate(identities):
            found.setdefault(identity, []).append(global_rank)
        hosts = [host for host, _ in found]
        return cls(tuple(map(tuple, found.values())), tuple(hosts[:at].count(host) for at, host in enumerate(hosts)))

    @property
    def count(self) -> int:
        return len(self.ranks)

    @property
    def first_ranks(self) -> tuple[int, ...]:
        """The first rank of each node, which acts for it."""
        return tuple(node[0] for node in self.ranks)

    def node_of(self, global_rank: int) -> int:
        return next(number for number, node in enumerate(self.ranks) if global_rank in node)

    def split(self, groups: Iterable[Sequence[int]]) -> list[Sequence[int]]:
        """Return the groups whose ranks are on several nodes."""
        return [ranks for ranks in groups if len(set(map(self.node_of, ranks))) > 1]

    def position(self, global_rank: int) -> int:
        """Return the position among the ranks of its node; also the line along which the rank's own file travels."""
        return self.ranks[self.node_of(global_rank)].index(global_rank)

    def lines(self) -> list[tuple[int, ...]]:
        """Return for each line the rank of each node, in the order of the ring."""
        longest = max(map(len, self.ranks))
        return [tuple(node[line % len(node)] for node in self.ranks) for line in range(longest)]

    def keeper_of(self, global_rank: int) -> int | None:
        """Return the rank of the next node that keeps a copy of this one's file; None on one node."""
        if self.count == 1:
            return None
        node = self.ranks[(self.node_of(global_rank) + 1) % self.count]
        return node[self.position(global_rank) % len(node)]

    def kept_by(self, global_rank: int) -> list[int]:
        """Return the ranks whose files this rank keeps copies of; none on one node."""
        before = self.ranks[(self.node_of(global_rank) - 1) % self.count]
        return [other for other in before if self.keeper_of(other) == global_rank]
