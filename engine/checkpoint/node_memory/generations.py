"""Generations in the memory of nodes: their order, their lost files, and the deliveries that a load needs. Pure.

A generation is one checkpoint whose files are spread over the nodes, each on the node that wrote it and on the next.
Nodes come and go: a generation can be used where each of its files is on some node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Generation:
    """Identity of a generation; newer ones are greater."""

    step: int
    attempt: int
    manifest: str
    """Hash of its manifest's file."""


@dataclass(frozen=True)
class Delivery:
    """One file that a node lacks, and the node that gives it."""

    file: str
    source: int
    target: int


def newest_first(held: Sequence[Collection[Generation]]) -> list[Generation]:
    """Return all generations that some node has something of; `held` is by node."""
    # by step, then attempt; the hash of the manifest tells two with equal numbers apart
    return sorted({generation for node in held for generation in node}, reverse=True)


def lost(files: Iterable[str], held: Sequence[Collection[str]]) -> list[str]:
    """Return the files that no node has; `held` is by node."""
    return [name for name in files if not any(name in node for node in held)]


def deliveries(needed: Sequence[Collection[str]], held: Sequence[Collection[str]]) -> list[Delivery]:
    """Return the deliveries after which each node has the files that its ranks will read, spread over their holders.

    `needed` and `held` are by node; each needed file is held by some node.
    """
    given: Counter[int] = Counter()
    found = []
    for target, names in enumerate(needed):
        for name in sorted(set(names) - set(held[target])):
            # The holder that has given the fewest files so far, or the first of these: every rank makes the same plan.
            source = min((node for node, own in enumerate(held) if name in own), key=lambda node: (given[node], node))
            given[source] += 1
            found.append(Delivery(name, source, target))
    return found
