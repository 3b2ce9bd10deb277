"""Layouts for a model and a cluster, best first, and in words what each pays for.

Every way to cut the world into pipe x tensor x data under every ZeRO stage is tried with each micro-batch size that
divides the global batch; of those that fit into memory the fastest by `step_time` is kept, and with a pipeline it is
tried with several chunks per stage. Tensor parallelism stays inside a node. What `resolve` refuses is never proposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from engine.config.resolve import Layout, examine
from engine.config.schema import ParallelConfig, RunConfig
from engine.plan.hardware import GIB, Cluster
from engine.plan.memory import MASTER_BYTES, MOMENTS_BYTES
from engine.plan.plan import Plan, stage_plans
from engine.plan.time import StepTime, step_time
from engine.plan.worlds import divisors, with_parallel

RESERVED_BYTES = 3 * GIB
"""Taken by the driver, the libraries and the communicators before a tensor is made."""
FRAGMENTED_SHARE = 0.10
"""Of what tensors take: lost between them by the allocator."""
LARGEST_MICRO_BATCH = 64
VIRTUAL_STAGES = (2, 4)
"""Chunks per pipeline stage that are tried beside one."""
SHOWN_SHARE = 0.005
"""A part that differs by less of a step is no reason."""
LARGEST_WORLD = 4096
"""No world beyond is searched for one that holds a model."""


@dataclass(frozen=True)
class Candidate:
    """One layout of a cluster."""

    parallel: ParallelConfig
    layout: Layout
    memory_bytes: int
    """Of the fullest rank, with what is reserved and lost."""
    host_bytes: int
    """The same in host memory: offloaded state, and the copy that a save takes."""
    time: StepTime
    fits: bool

    def __str__(self) -> str:
        layout, parallel = self.layout, self.parallel
        return (
            f"ZeRO-{parallel.zero_stage}, pipe {layout.pipe} x tensor {layout.tensor} x data {layout.data}, "
            f"micro-batch {parallel.micro_batch_size}"
            + (f", {parallel.virtual_stages} virtual stages" if parallel.virtual_stages > 1 else "")
            + (f", offload {parallel.offload}" if parallel.offload != "none" else "")
        )

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "layout": asdict(self.layout),
            "zero_stage": self.parallel.zero_stage,
            "micro_batch_size": self.parallel.micro_batch_size,
            "virtual_stages": self.parallel.virtual_stages,
            "offload": self.parallel.offload,
            "memory_bytes": self.memory_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "seconds": self.time.total,
            "band_seconds": self.time.band,
            "shares": self.time.shares(),
            "utilisation": self.time.utilisation,
        }

    def why(self, best: Candidate) -> str:
        """Against the best layout: how much longer a step takes, and the parts that make the difference.

        More arithmetic for the same work means uneven stages, or products too small to fill the machine.
        """
        if self is best:
            costs = [f"{name} {share:.1%}" for name, share in self.time.shares().items() if name != "arithmetic"]
            return f"fastest; beside arithmetic: {', '.join(costs[:2])}"
        whole = best.time.total
        more = {name: (seconds - best.time.parts()[name]) / whole for name, seconds in self.time.parts().items()}
        grown = sorted((share, name) for name, share in more.items() if share >= SHOWN_SHARE)
        reasons = ", ".join(f"{name} {share:+.1%}" for share, name in reversed(grown[-2:])) or "as fast"
        return f"{self.time.total / whole - 1:+.1%}: {reasons}"


@dataclass(frozen=True)
class Advice:
    """What a cluster makes of a run: the planned layout's step, and the layouts of the same world, best first."""

    cluster: Cluster
    planned: Candidate
    ranked: tuple[Candidate, ...]
    offloaded: Candidate | None
    """Where nothing fits: the best layout of the same world that does with the optimizer's state in host memory."""
    larger: Candidate | None
    """Where nothing fits: the best layout of the smallest larger world (by doubling) on which something does."""

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        ranked = [candidate.as_json() | {"why": candidate.why(self.ranked[0])} for candidate in self.ranked]
        larger = None if self.larger is None else self.larger.as_json()
        offloaded = None if self.offloaded is None else self.offloaded.as_json()
        return {"planned": self.planned.as_json(), "ranked": ranked, "offloaded": offloaded, "larger": larger}


def advise(config: RunConfig, plan: Plan, cluster: Cluster) -> Advice:
    """The advice for a run that was planned on the cluster's world."""
    ranked = tuple(rank(config, cluster))
    offloaded = larger = None
    if not any(candidate.fits for candidate in ranked):
        offloaded = next((one for one in rank(with_parallel(config, offload="optimizer"), cluster) if one.fits), None)
        larger = smallest_world(config, cluster, LARGEST_WORLD)
    return Advice(cluster, judge(config, plan.layout, cluster), ranked, offloaded, larger)


def rank(config: RunConfig, cluster: Cluster) -> list[Candidate]:
    """The best candidate of every (pipe, tensor, ZeRO stage), those that fit first, fastest first.

    Where none fits the first one is the one that needs the least memory.
    """
    best: dict[tuple[int, int, int], Candidate] = {}
    for candidate in _candidates(config, cluster):
        key = (candidate.layout.pipe, candidate.layout.tensor, candidate.parallel.zero_stage)
        if key not in best or _order(candidate) < _order(best[key]):
            best[key] = candidate
    chosen = [min((one, *_interleaved(config, one, cluster)), key=_order) for one in best.values()]
    return sorted(chosen, key=_order)


def smallest_world(config: RunConfig, cluster: Cluster, largest: int) -> Candidate | None:
    """The best layout of the smallest world (doubling from the cluster's own) on which some layout fits."""
    size = cluster.world_size
    while size <= largest:
        ranked = rank(config, replace(cluster, world_size=size))
        if ranked and ranked[0].fits:
            return ranked[0]
        size *= 2
    return None


def _order(candidate: Candidate) -> tuple[bool, float]:
    return not candidate.fits, candidate.time.total if candidate.fits else candidate.memory_bytes


def _candidates(config: RunConfig, cluster: Cluster) -> Iterator[Candidate]:
    world = cluster.world_size
    for tensor in divisors(min(world, cluster.per_node)):
        for pipe in divisors(world // tensor) if world % tensor == 0 else ():
            data = world // tensor // pipe
            for size, zero_stage in product(_micro_batch_sizes(config, data), range(4)):
                gather, within = config.parallel.gather, config.parallel.gather_within
                if zero_stage < 3:
                    gather = within = None
                elif within is not None and (data % within or data == within):
                    within = None
                axes = {"pipe": pipe, "tensor": tensor, "data": data, "virtual_stages": 1}
                zero = {"zero_stage": zero_stage, "gather": gather, "gather_within": within}
                tried = with_parallel(config, **axes, **zero, micro_batch_size=size)
                yield from _judged(tried, cluster)


def _interleaved(config: RunConfig, candidate: Candidate, cluster: Cluster) -> Iterator[Candidate]:
    """The same layout with more chunks per pipeline stage; what `resolve` refuses is left out."""
    for virtual_stages in VIRTUAL_STAGES if candidate.layout.pipe > 1 else ():
        parallel = candidate.parallel.model_copy(update={"virtual_stages": virtual_stages})
        yield from _judged(config.model_copy(update={"parallel": parallel}), cluster)


def _judged(config: RunConfig, cluster: Cluster) -> Iterator[Candidate]:
    layout, problems = examine(config, cluster.world_size)
    if layout is not None and not problems:
        yield judge(config, layout, cluster)


def _micro_batch_sizes(config: RunConfig, data: int) -> list[int]:
    """Powers of two that divide the share of a data rank; none where the ranks do not divide the batch."""
    share, rest = divmod(config.stages[0].global_batch_size, data)
    sizes = [2**power for power in range(LARGEST_MICRO_BATCH.bit_length()) if 2**power <= LARGEST_MICRO_BATCH]
    return [] if rest else [size for size in sizes if share % size == 0]


def judge(config: RunConfig, layout: Layout, cluster: Cluster) -> Candidate:
    """What a cluster makes of one layout, which `resolve` or `examine` gave."""
    stages = stage_plans(config, layout)
    tensors = max(stage.memory.total for stage in stages)
    needed = int(tensors * (1 + FRAGMENTED_SHARE)) + RESERVED_BYTES
    on_host = max(stage.memory.host + (MASTER_BYTES + MOMENTS_BYTES) * stage.updated for stage in stages)
    accelerator = cluster.accelerator
    return Candidate(
        config.parallel,
        layout,
        needed,
        on_host,
        step_time(config, layout, stages, cluster),
        fits=needed <= accelerator.memory_bytes and on_host <= accelerator.host_memory_bytes,
    )
