"""Layouts for a model and a cluster, ranked by their estimated step time, each with the reasons for its rank.

Every way to cut the world into pipe x tensor x data under every ZeRO stage is tried with each micro-batch size that
divides the global batch. A layout that does not fit into memory is tried with the options that save memory, the
cheapest first: sequence parallelism, then recomputation. Of those that fit the fastest by `step_time` is kept, and the
best of these are tried with several chunks per pipeline stage, with sequence parallelism and without. Where nothing
fits, all of it is tried once more with the optimizer's state in host memory.
Tensor parallelism stays inside a node. What `resolve` refuses is never proposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from engine.config.resolve import Layout, examine
from engine.config.rules.model import divisors
from engine.config.schema.parallel import ParallelConfig
from engine.config.schema.run import RunConfig
from engine.plan.hardware import GIB, Accelerator, Cluster
from engine.plan.memory import DTYPE_BYTES, MASTER_BYTES, MOMENTUM_BYTES, with_reserve
from engine.plan.parameters import num_parameters
from engine.plan.plan import Plan, run_stage_plans
from engine.plan.time import StepTime, mean_step_time
from engine.plan.worlds import with_parallel

AXES = ("pipe", "tensor", "zero_stage", "micro_batch_size")
"""Keys that are always named."""
LARGEST_MICRO_BATCH = 64
"""Largest micro-batch, in samples, that is tried."""
CHUNKS_PER_STAGE = (1, 2, 4)
"""Chunks per pipeline stage that are tried."""
RECOMPUTE = ("none", "selective", "full")
"""Ways to recompute, from the cheapest to the one that saves most memory."""
OFFLOAD = ("none", "optimizer")
REFINED_FACTOR = 1.5
"""Layouts slower than the fastest by more than this factor are not refined (chunks, sequence parallelism)."""
SHOWN_SHARE = 0.005
"""Smallest difference, as a share of the best step, that counts as a reason."""
LARGEST_SEARCHED = 4096
"""Largest world, in ranks, that is searched for one that holds the model."""
LARGEST_PIPE = 256
"""Largest number of pipeline stages that is tried."""


@dataclass(frozen=True)
class Candidate:
    """One layout of a cluster."""

    parallel: ParallelConfig
    layout: Layout
    memory_bytes: int
    """Bytes of the fullest rank in the run stage that needs the most, with what is reserved and lost."""
    host_bytes: int
    """Bytes of the fullest rank in host memory: offloaded state, and the copy that a save takes."""
    states_bytes: int
    """Bytes of the states alone; activations and the loss, which recomputation and small micro-batches reduce, are
    left out."""
    plain_bytes: int
    """Bytes that the layout would need without the options that make it fit: sequence parallelism, recomputation."""
    time: StepTime
    """Mean step of the run; with one run stage, the step of its largest batch."""
    accelerator: Accelerator

    @property
    def holds_states(self) -> bool:
        """True if the accelerator and its host hold the states, which only other axes or `offload` reduce."""
        accelerator = self.accelerator
        return self.states_bytes <= accelerator.memory_bytes and self.host_bytes <= accelerator.host_memory_bytes

    @property
    def fits(self) -> bool:
        return self.holds_states and self.memory_bytes <= self.accelerator.memory_bytes

    @property
    def need(self) -> float:
        """Needed bytes over available bytes, of the device or the host, whichever is scarcer; above 1 it does not fit.

        Of the states alone where those are too large already."""
        needed = self.memory_bytes if self.holds_states else self.states_bytes
        return max(needed / self.accelerator.memory_bytes, self.host_bytes / self.accelerator.host_memory_bytes)

    def lack(self) -> str:
        """Return the reasons why it does not fit, as text; empty where it fits."""
        device, host = self.accelerator.memory_bytes, self.accelerator.host_memory_bytes
        lacks = []
        if self.states_bytes > device:
            lacks.append(f"what training holds beside activations needs {_of(self.states_bytes, device)}")
        elif self.memory_bytes > device:
            lacks.append(f"needs {_of(self.memory_bytes, device)}")
        if self.host_bytes > host:
            lacks.append(f"needs {_of(self.host_bytes, host)} of host memory per GPU")
        return " and ".join(lacks)

    def __str__(self) -> str:
        layout, parallel = self.layout, self.parallel
        return (
            f"ZeRO-{parallel.zero_stage}, pipe {layout.pipe} x tensor {layout.tensor} x data {layout.data}"
            + (f" x sequence {layout.sequence}" if layout.sequence > 1 else "")
            + f", micro-batch {parallel.micro_batch_size}"
            + (f", {parallel.chunks_per_stage} chunks per stage" if parallel.chunks_per_stage > 1 else "")
            + (", sequence parallel" if parallel.sequence_parallel else "")
            + (f", recompute {parallel.recompute}" if parallel.recompute != "none" else "")
            + (f", offload {parallel.offload}" if parallel.offload != "none" else "")
        )

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "layout": asdict(self.layout),
            "zero_stage": self.parallel.zero_stage,
            "micro_batch_size": self.parallel.micro_batch_size,
            "chunks_per_stage": self.parallel.chunks_per_stage,
            "sequence_parallel": self.parallel.sequence_parallel,
            "recompute": self.parallel.recompute,
            "offload": self.parallel.offload,
            "memory_bytes": self.memory_bytes,
            "plain_bytes": self.plain_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "seconds": self.time.total,
            "band_seconds": self.time.band,
            "shares": self.time.shares(),
            "utilisation": self.time.utilisation,
        }

    def keys(self, config: RunConfig) -> dict[str, Any]:
        """Return the keys of `parallel` that a run sets for this layout: the axes, and all that differ from the
        defaults or from the run.

        The data axis is left to the world unless the run fixes it.
        """
        before, now, plain = (one.model_dump() for one in (config.parallel, self.parallel, ParallelConfig()))
        if config.parallel.data is None:
            # A number of data ranks in the run file would tie it to this world; left out, each start derives it.
            now["data"] = None
        return {key: value for key, value in now.items() if key in AXES or value != plain[key] or value != before[key]}

    def why(self, best: Candidate) -> str:
        """Return how much longer a step takes than the best layout's, and the parts that make the difference, as text.

        More arithmetic for the same work means uneven stages, or products too small to fill the machine. Options that
        save memory are there because the layout would not fit without them.
        """
        return self._costs(best) + (f"; {self.plain_bytes / GIB:.0f} GiB if plain" if self.saves_memory else "")

    @property
    def saves_memory(self) -> bool:
        """True if it uses an option that saves memory, without which it would not fit."""
        return self.plain_bytes > self.memory_bytes

    def _costs(self, best: Candidate) -> str:
        if self is best:
            # `shares` is sorted, so the first two are the largest costs beside the useful work.
            costs = [f"{name} {share:.1%}" for name, share in self.time.shares().items() if name != "arithmetic"]
            return f"fastest; beside arithmetic: {', '.join(costs[:2])}"
        whole = best.time.total
        more = {name: (seconds - best.time.parts()[name]) / whole for name, seconds in self.time.parts().items()}
        # Shares are of the best layout's step, so the reasons and the total (`self / best - 1`) are in one unit.
        grown = sorted((share, name) for name, share in more.items() if share >= SHOWN_SHARE)
        reasons = ", ".join(f"{name} {share:+.1%}" for share, name in reversed(grown[-2:])) or "as fast"
        return f"{self.time.total / whole - 1:+.1%}: {reasons}"


@dataclass(frozen=True)
class Advice:
    """Layouts of a run on a cluster: the planned layout's step, and the layouts of the same world, best first."""

    cluster: Cluster
    planned: Candidate
    ranked: tuple[Candidate, ...]
    larger: tuple[Candidate, ...]
    """The `larger_worlds` where nothing fits without `offload`; those with it where nothing fits at all."""

    @property
    def best(self) -> Candidate | None:
        """The fastest layout of this world that fits."""
        return self.ranked[0] if self.ranked and self.ranked[0].fits else None

    def as_json(self, config: RunConfig) -> dict[str, Any]:
        """Plain numbers and text; `keys` are those of `parallel` in the run's configuration."""
        ranked = [
            candidate.as_json() | {"why": candidate.why(self.ranked[0]), "keys": candidate.keys(config)}
            for candidate in self.ranked
        ]
        larger = [candidate.as_json() for candidate in self.larger]
        return {"planned": self.planned.as_json(), "ranked": ranked, "larger": larger}


def advise(config: RunConfig, plan: Plan, cluster: Cluster) -> Advice:
    """Return the advice for a run that was planned on the cluster's world."""
    ranked = rank(config, cluster)
    plain = any(candidate.fits and candidate.parallel.offload == "none" for candidate in ranked)
    larger = [] if plain else larger_worlds(config, cluster, LARGEST_SEARCHED)
    if ranked and ranked[0].fits:
        # This world already runs with `offload`, so a larger one that needs it as well is no improvement.
        larger = [one for one in larger if one.parallel.offload == "none"]
    return Advice(cluster, judge(config, plan.layout, cluster), tuple(ranked), tuple(larger))


def rank(config: RunConfig, cluster: Cluster) -> list[Candidate]:
    """Return the best candidate of every (pipe, tensor, ZeRO stage), those that fit first, fastest first.

    Where none fits, those with the optimizer's state in host memory. Where none of these fits either, both lists
    together, first the candidate that exceeds its memory by the smallest factor.
    """
    found: list[Candidate] = []
    for offload in OFFLOAD:
        ranked = _rank(with_parallel(config, offload=offload), cluster)
        if ranked and ranked[0].fits:
            return ranked
        found += ranked
    return sorted(found, key=_order)


def _rank(config: RunConfig, cluster: Cluster) -> list[Candidate]:
    """Rank the layouts for one location of the optimizer's state."""
    cuts = [_best(config, cluster, *axes, zero_stage) for axes in _axes(config, cluster) for zero_stage in range(4)]
    best = [candidate for candidate in cuts if candidate is not None]
    fastest = min((one.time.total for one in best if one.fits), default=0.0)
    # Refining judges up to six forms of a layout; layouts that start out much slower are left as they are.
    limit = REFINED_FACTOR * fastest
    refined = [
        min((one, *_refined(config, one, cluster)), key=_order) if one.fits and one.time.total <= limit else one
        for one in best
    ]
    return sorted(refined, key=_order)


def larger_worlds(config: RunConfig, cluster: Cluster, largest: int) -> list[Candidate]:
    """Return the best layout of the smallest larger world (doubling the cluster's own) that holds the run.

    Where a smaller of these worlds holds it with `offload` only, that one's best layout comes first.
    """
    found: list[Candidate] = []
    size = 2 * cluster.world_size
    while size <= largest:
        # A ranking judges thousands of layouts; this bound is one division, and skips worlds that no layout can save.
        if not _can_hold(config, replace(cluster, world_size=size)):
            size *= 2
            continue
        best = next(iter(rank(config, replace(cluster, world_size=size))), None)
        if best is not None and best.fits:
            if best.parallel.offload == "none":
                return [*found, best]
            found = found or [best]  # keep the smallest world with `offload`, and look on for one without
        size *= 2
    return found


def _can_hold(config: RunConfig, cluster: Cluster) -> bool:
    """Return True if weights and gradients, each held once, with the rest on hosts, do not fill the accelerators."""
    precision, accelerator = config.precision, cluster.accelerator
    # A lower bound that no layout beats: ZeRO-3 over all ranks, no activations, all optimizer state offloaded. It
    # takes one moment (Muon's 4 bytes) and not Adam's two, so that it holds for both optimizers.
    on_device = DTYPE_BYTES[precision.dtype] + DTYPE_BYTES[precision.reduce_dtype]
    per_rank = num_parameters(config.model) // cluster.world_size
    return (
        per_rank * on_device < accelerator.memory_bytes
        and per_rank * (on_device + MASTER_BYTES + MOMENTUM_BYTES)
        < accelerator.memory_bytes + accelerator.host_memory_bytes
    )


def _of(needed: int, there: int) -> str:
    return f"{needed / GIB:.3g} of {there / GIB:.3g} GiB"


def _order(candidate: Candidate) -> tuple[bool, bool, float]:
    fits = candidate.fits
    # False sorts before True: those that fit by seconds, then those whose states fit, then the rest by shortage.
    return not fits, not candidate.holds_states, candidate.time.total if fits else candidate.need


def _axes(config: RunConfig, cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """Yield (pipe, tensor, data) of every cut of the world with the run's `parallel.sequence`; tensor ranks fit into a
    node."""
    world, rest = divmod(cluster.world_size, config.parallel.sequence)
    if rest:
        return
    # Tensor ranks exchange activations several times per layer, which only the links inside a node are fast enough
    # for (Narayanan et al. 2021, section 3.2); groups whose size divides a node's never straddle two nodes.
    for tensor in divisors(min(world, cluster.per_node)):
        for pipe in divisors(world // tensor) if world % tensor == 0 else ():
            if pipe <= LARGEST_PIPE:
                yield pipe, tensor, world // tensor // pipe


def _best(config: RunConfig, cluster: Cluster, pipe: int, tensor: int, data: int, zero_stage: int) -> Candidate | None:
    """Return the candidate with the best micro-batch size of a cut, one chunk per stage; None if all are refused."""
    best = None
    gather, within = config.parallel.gather, config.parallel.gather_within
    zero_ranks = data * config.parallel.sequence
    # `gather` and `gather_within` are ZeRO-3's alone, and hpZ's groups have to divide the ranks of ZeRO and be fewer.
    if zero_stage < 3:
        gather = within = None
    elif within is not None and (zero_ranks % within or zero_ranks == within):
        within = None
    axes = {"pipe": pipe, "tensor": tensor, "data": data, "chunks_per_stage": 1}
    zero = {"zero_stage": zero_stage, "gather": gather, "gather_within": within}
    for size in _micro_batch_sizes(config, data):
        tried = with_parallel(config, **axes, **zero, micro_batch_size=size)
        candidate = _leanest_needed(tried, cluster, _sequence_parallel_choices(tensor))
        if candidate is None:
            continue
        best = candidate if best is None else min(best, candidate, key=_order)
        if not candidate.fits:
            break  # larger ones hold more
    return best


def _refined(config: RunConfig, candidate: Candidate, cluster: Cluster) -> Iterator[Candidate]:
    """Yield the same layout with other numbers of chunks per stage, with sequence parallelism and without."""
    chunks = CHUNKS_PER_STAGE if candidate.layout.pipe > 1 else (1,)
    for chunks_per_stage, sequence_parallel in product(chunks, _sequence_parallel_choices(candidate.layout.tensor)):
        parallel = candidate.parallel.model_copy(update={"chunks_per_stage": chunks_per_stage})
        found = _leanest_needed(config.model_copy(update={"parallel": parallel}), cluster, (sequence_parallel,))
        if found is not None:
            yield found


def _sequence_parallel_choices(tensor: int) -> tuple[bool, ...]:
    """Return the values of `parallel.sequence_parallel` that make a difference with so many tensor ranks."""
    return (False, True) if tensor > 1 else (False,)


def _leanest_needed(config: RunConfig, cluster: Cluster, choices: tuple[bool, ...]) -> Candidate | None:
    """Return the candidate with the fewest options that save memory with which it fits: sequence parallelism, of the
    values in `choices`, and recomputation.

    Where it never fits it has all of them, or none where its states alone are too large. None where `resolve` refuses
    it.
    """
    plain = with_parallel(config, recompute="none", recompute_layers=None, activation_gib=None)
    examined = {one: examine(with_parallel(plain, sequence_parallel=one), cluster.world_size) for one in choices}
    layouts = {one: layout for one, (layout, problems) in examined.items() if layout is not None and not problems}
    if not layouts:
        return None
    # False < True: `first` is without sequence parallelism where that is valid, `last` with it.
    first, last = min(layouts), max(layouts)
    # From the fastest to the one that saves most memory: plain, then sequence parallel, then with recomputation.
    ways = list(dict.fromkeys([(first, "none"), *((last, how) for how in RECOMPUTE)]))
    judged = [
        partial(judge, with_parallel(plain, sequence_parallel=one, recompute=how), layouts[one], cluster)
        for one, how in ways
    ]
    # Judging is the cost of a ranking, so the ends come first: plain settles most layouts, and where even the
    # leanest does not fit, none between them can.
    candidate = judged[0]()
    if candidate.fits or not candidate.holds_states:
        return candidate
    sparing = judged[-1]()
    between = (one() for one in judged[1:-1]) if sparing.fits else ()
    return replace(next((one for one in between if one.fits), sparing), plain_bytes=candidate.memory_bytes)


def _micro_batch_sizes(config: RunConfig, data: int) -> list[int]:
    """Powers of two that divide a data rank's share of every batch; none where the ranks do not divide some batch.

    Batches of 96 and 64 on 4 data ranks: gcd 32, a share of 8 samples, and sizes 1, 2, 4 and 8.
    """
    share, rest = divmod(math.gcd(*(size for stage in config.stages for size in stage.batches.sizes)), data)
    sizes = [2**power for power in range(LARGEST_MICRO_BATCH.bit_length())]
    return [] if rest else [size for size in sizes if share % size == 0]


def judge(config: RunConfig, layout: Layout, cluster: Cluster) -> Candidate:
    """Return the candidate that a cluster makes of one layout, which `resolve` or `examine` gave."""
    run_stages = run_stage_plans(config, layout)
    stages = [stage for run_stage in run_stages for stage in run_stage.stages]
    tensors = max(stage.memory.total for stage in stages)
    states = max(stage.memory.states for stage in stages)
    # The fullest rank of any stage decides. Device and host are maxima of their own: they may be of different stages.
    needed, least = with_reserve(tensors), with_reserve(states)
    on_host = max(stage.memory.host + stage.stored_bytes for stage in stages)
    return Candidate(
        config.parallel,
        layout,
        needed,
        on_host,
        least,
        needed,
        mean_step_time(config, layout, run_stages, cluster),
        cluster.accelerator,
    )
