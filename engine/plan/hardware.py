"""Clusters as a plan knows them: the accelerator's figures and the number of them on a node.

Bandwidths are per accelerator and direction, as the collectives of a ring see them. An accelerator's own figures are
those of NVIDIA's data sheet for its SXM form: dense bf16 without sparsity, half of the NVLink bandwidth, which counts
both directions. The host's are not measured: they are the peak that its parts have by their standards, for NVIDIA's
reference node of eight (DGX A100, H100, H200, B200), which has two processors and one PCIe x16 link and one card of 200
or 400 Gbit/s per accelerator. Nodes that are built differently have other hosts: many have half the memory.
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
    """Bytes per second to the other GPUs of its node (NVLink), one direction."""
    network_bytes_per_second: float
    """Bytes per second to other nodes, one direction."""
    host_memory_bytes: int
    """Memory of its reference node, divided by the node's accelerators; so are the next two."""
    host_bytes_per_second: float
    """Bandwidth of the host's memory."""
    host_link_bytes_per_second: float
    """Between host and accelerator (PCIe), one direction."""


NODE = 8
"""Accelerators of a reference node."""


def _host_memory(num_dimms: int, dimm_gib: int) -> int:
    """Return the bytes of host memory per accelerator of a reference node."""
    return num_dimms * dimm_gib * GIB // NODE


def _ddr(transfers_per_second: float) -> float:
    """Bytes per second of host memory per accelerator: two processors with eight channels each, of 8 bytes (JEDEC
    DDR4, DDR5)."""
    return 2 * 8 * 8 * transfers_per_second / NODE


def _pcie(transfers_per_second: float) -> float:
    """Bytes per second of 16 lanes in one direction, with their 128b/130b code and without what packets cost (PCI-SIG):
    31.5 GB/s for PCIe 4.0, 63.0 GB/s for 5.0. MLPerf's description of an H200 node has 504 GB/s for eight of them."""
    return 16 * transfers_per_second * 128 / 130 / 8


DGX_A100_40GB = _host_memory(16, 64), _ddr(3.2e9), _pcie(16e9)
"""1 TB; two EPYC 7742, DDR4-3200 (DGX A100 System, user guide DU-09821); PCIe 4.0."""
DGX_A100_80GB = _host_memory(32, 64), _ddr(3.2e9), _pcie(16e9)
"""2 TB with the larger accelerators."""
DGX_H100 = _host_memory(32, 64), _ddr(4.8e9), _pcie(32e9)
"""2 TB in 32 modules; two Xeon Platinum 8480C, DDR5-4800; PCIe 5.0. The DGX H200 has the same host."""
DGX_B200 = _host_memory(32, 64), _ddr(5.6e9), _pcie(32e9)
"""2 TB in 32 modules, which can be 4; two Xeon Platinum 8570, DDR5-5600; PCIe 5.0."""
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("a100-40gb", 40 * GIB, 312e12, 1.555e12, 300e9, 25e9, *DGX_A100_40GB),
        Accelerator("a100-80gb", 80 * GIB, 312e12, 2.039e12, 300e9, 25e9, *DGX_A100_80GB),
        Accelerator("h100-80gb", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9, *DGX_H100),
        Accelerator("h200-141gb", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, *DGX_H100),
        Accelerator("b200-180gb", 180 * 10**9, 2250e12, 8e12, 900e9, 50e9, *DGX_B200),
    )
}


@dataclass(frozen=True)
class Cluster:
    """`world_size` accelerators, `per_node` on each node; ranks lie on nodes in order."""

    accelerator: Accelerator
    world_size: int
    per_node: int

    def ranks_per_node(self, group_size: int, stride: int) -> int:
        """Return the number of ranks of one node in a group of `group_size` ranks that stand `stride` apart."""
        # At least the rank itself: with a stride of a node or more, each rank of the group is on a node of its own.
        return max(1, min(group_size, self.per_node // stride))

    def bytes_per_second(self, group_size: int, stride: int) -> float:
        """Bytes per second that a rank of such a group sends to the next one of a ring while all groups do the same.

        Inside a node the link's; across nodes the cards of a node carry one flow for each group that leaves it, and a
        group with several ranks on a node uses the cards of them all.

        On nodes of eight A100: a data group with one rank per node (stride 8) has one card's 25 GB/s, a group of 4
        with two ranks per node (stride 4) 50 GB/s, and a group of 16 over two nodes (stride 1) 200 GB/s.
        """
        accelerator, inside = self.accelerator, self.ranks_per_node(group_size, stride)
        if inside == group_size:
            return accelerator.link_bytes_per_second
        return min(accelerator.link_bytes_per_second, accelerator.network_bytes_per_second * inside)


def cluster(name: str, world_size: int, per_node: int) -> Cluster:
    """Return a cluster of one kind of accelerator.

    Raises:
        ConfigError: the kind is not known.
    """
    if name not in ACCELERATORS:
        raise ConfigError(f"--gpu {name} is not known", f"one of {', '.join(ACCELERATORS)}", "take the nearest one")
    return Cluster(ACCELERATORS[name], world_size, per_node)
