"""What a plan has to know of a cluster: the accelerator's figures and how many share a node. Vendors' published values.

Bandwidths are per accelerator and direction, as the collectives of a ring see them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError

GIB = 1024**3


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU. `network` is the usual network card per GPU of its reference node."""

    name: str
    memory_bytes: int
    bf16_operations_per_second: float
    """Dense matrix products."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the other GPUs of its node (NVLink), one direction."""
    network_bytes_per_second: float
    """To other nodes, one direction."""
    host_memory_bytes: int
    """Of its reference node, divided by the node's accelerators; so are the next two."""
    host_bytes_per_second: float
    """Of the host's memory."""
    host_link_bytes_per_second: float
    """Between host and accelerator (PCIe), one direction."""


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("a100-40gb", 40 * GIB, 312e12, 1.555e12, 300e9, 25e9, 128 * GIB, 51e9, 32e9),
        Accelerator("a100-80gb", 80 * GIB, 312e12, 2.039e12, 300e9, 25e9, 256 * GIB, 51e9, 32e9),
        Accelerator("h100-80gb", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9, 256 * GIB, 77e9, 64e9),
        Accelerator("h200-141gb", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, 256 * GIB, 77e9, 64e9),
        Accelerator("b200-180gb", 180 * 10**9, 2250e12, 8e12, 900e9, 50e9, 256 * GIB, 90e9, 64e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """`world_size` accelerators, `per_node` on each node; ranks lie on nodes in order."""

    accelerator: Accelerator
    world_size: int
    per_node: int

    def ranks_per_node(self, group_size: int, stride: int) -> int:
        """Ranks of one node in a group of `group_size` ranks that stand `stride` apart."""
        return max(1, min(group_size, self.per_node // stride))

    def bytes_per_second(self, group_size: int, stride: int) -> float:
        """What one rank of such a group sends to the next one of a ring, while every other group does the same.

        Inside a node the link's; across nodes the cards of a node carry one flow for each group that leaves it, and a
        group with several ranks on a node uses the cards of them all.
        """
        accelerator, inside = self.accelerator, self.ranks_per_node(group_size, stride)
        if inside == group_size:
            return accelerator.link_bytes_per_second
        return min(accelerator.link_bytes_per_second, accelerator.network_bytes_per_second * inside)


def cluster(name: str, world_size: int, per_node: int) -> Cluster:
    """A cluster of one kind of accelerator.

    Raises:
        ConfigError: the kind is not known.
    """
    if name not in ACCELERATORS:
        raise ConfigError(f"--gpu {name} is not known", f"one of {', '.join(ACCELERATORS)}", "take the nearest one")
    return Cluster(ACCELERATORS[name], world_size, per_node)
