"""Ranking: everything proposed can start and fits, the order is that of the estimate, and the reasons add up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.load import load_run
from engine.config.resolve import examine
from engine.config.schema.run import RunConfig
from engine.errors import ConfigError
from engine.plan.hardware import GIB, Cluster, cluster
from engine.plan.memory import FRAGMENTED_SHARE, RESERVED_BYTES
from engine.plan.plan import make_plan, run_stage_plans
from engine.plan.ranking import Candidate, advise, judge, larger_worlds, rank
from engine.plan.worlds import with_parallel

RUNS = Path(__file__).parents[3] / "configs" / "runs"
LARGE = [
    "model.num_layers=80",
    "model.hidden_size=8192",
    "model.num_heads=64",
    "model.num_kv_heads=8",
    "model.feed_forward_size=28672",
]


def test_what_is_proposed_can_start_and_fits_and_comes_fastest_first():
    config = load_run(RUNS / "llama-1b.yaml", [])
    ranked = rank(config, cluster("a100-40gb", 16, 8))
    fitting = [candidate for candidate in ranked if candidate.fits]
    assert len(fitting) > 5
    assert any(candidate.parallel.chunks_per_stage > 1 for candidate in fitting)
    assert all(candidate.parallel.chunks_per_stage == 1 for candidate in ranked if candidate.layout.pipe == 1)
    for candidate in fitting:
        tried = config.model_copy(update={"parallel": candidate.parallel})
        layout, problems = examine(tried, 16)
        assert problems == []
        assert layout == candidate.layout
        fullest = max(stage.memory.total for stage in run_stage_plans(tried, candidate.layout)[0].stages)
        assert fullest * (1 + FRAGMENTED_SHARE) + RESERVED_BYTES <= 40 * 2**30
        assert candidate.layout.tensor <= 8, "tensor parallelism stays inside a node"
    seconds = [candidate.time.total for candidate in fitting]
    assert seconds == sorted(seconds)
    assert [candidate.fits for candidate in ranked] == sorted((c.fits for c in ranked), reverse=True)


def test_a_run_with_sequence_ranks_keeps_them_in_every_layout():
    config = with_parallel(load_run(RUNS / "llama-1b.yaml", []), sequence=2, gather_within=2)
    ranked = rank(config, cluster("h100-80gb", 8, 8))
    assert ranked
    for candidate in ranked:
        assert candidate.layout.sequence == 2
        assert examine(config.model_copy(update={"parallel": candidate.parallel}), 8) == (candidate.layout, [])
        assert "x sequence 2, micro-batch" in str(candidate)
    assert any(candidate.parallel.gather_within == 2 for candidate in ranked if candidate.layout.data == 4)
    assert rank(with_parallel(config, sequence=3), cluster("h100-80gb", 8, 8)) == []


def test_each_layout_says_what_it_pays_for():
    ranked = rank(load_run(RUNS / "llama-1b.yaml", []), cluster("h100-80gb", 16, 8))
    best, *others = ranked
    assert best.why(best).startswith("fastest")
    deep = next(candidate for candidate in others if candidate.layout.pipe == 16)
    assert "idle +" in deep.why(best)
    wide = next(candidate for candidate in others if candidate.layout.tensor == 4 and candidate.layout.pipe == 1)
    assert f"{wide.time.total / best.time.total - 1:+.1%}: tensor" in wide.why(best)
    assert sum(wide.time.shares().values()) == pytest.approx(1)


def test_what_spares_memory_is_taken_where_a_layout_needs_it_and_says_so():
    ranked = rank(load_run(RUNS / "llama-1b.yaml", LARGE), cluster("h100-80gb", 64, 8))
    sparing = [candidate for candidate in ranked if candidate.fits and candidate.saves_memory]
    assert {candidate.parallel.recompute for candidate in sparing} >= {"none", "selective", "full"}
    assert any(candidate.parallel.sequence_parallel for candidate in sparing)
    for candidate in sparing:
        assert candidate.memory_bytes <= 80 * 2**30 < candidate.plain_bytes
        assert f"{candidate.plain_bytes / 2**30:.0f} GiB if plain" in candidate.why(ranked[0])
    whole = next(candidate for candidate in sparing if candidate.parallel.recompute == "full")
    assert whole.time.recompute == pytest.approx(whole.time.arithmetic / 3, rel=0.1), "a forward pass once more"
    selective = next(candidate for candidate in sparing if candidate.parallel.recompute == "selective")
    assert 0 < selective.time.recompute < selective.time.arithmetic / 20
    plain = next(candidate for candidate in ranked if candidate.fits and not candidate.saves_memory)
    assert "if plain" not in plain.why(ranked[0])


@pytest.mark.parametrize(
    ("gpu", "memory_gib", "offload"),
    [("a100-40gb", None, "none"), ("h100-80gb", None, "none"), ("h100-80gb", 4.5, "optimizer")],
    ids=["a100-40gb", "h100-80gb", "4.5 GiB"],
)
def test_no_other_form_of_a_layout_is_faster_than_the_best(gpu: str, memory_gib: float | None, offload: str):
    """Every combination of what is tried, one by one, on machines that hold little; on the last one nothing without
    the optimizer's state in host memory."""
    config, machine = (
        load_run(RUNS / "llama-1b.yaml", ["model.num_layers=8", "stages.0.sequence_length=2048"]),
        cluster(gpu, 4, 2),
    )
    if memory_gib is not None:
        machine = replace(machine, accelerator=replace(machine.accelerator, memory_bytes=int(memory_gib * GIB)))
    fitting = {
        place: [one for one in _all_forms(with_parallel(config, offload=place), machine) if one.fits]
        for place in ("none", "optimizer")
    }
    assert bool(fitting["none"]) == (offload == "none")
    found = rank(config, machine)[0]
    assert found.parallel.offload == offload
    assert found.time.total == pytest.approx(min(one.time.total for one in fitting[offload]), rel=0.01)


def _all_forms(config: RunConfig, machine: Cluster) -> Iterator[Candidate]:
    for pipe, tensor, zero_stage in itertools.product((1, 2, 4), (1, 2), range(4)):
        for size, chunks, how, shared in itertools.product(
            (1, 2, 4, 8, 16, 32, 64), (1, 2, 4), ("none", "selective", "full"), (False, True)
        ):
            keys = {"pipe": pipe, "tensor": tensor, "data": 4 // (pipe * tensor) or 1, "zero_stage": zero_stage}
            options = {
                "micro_batch_size": size,
                "chunks_per_stage": chunks,
                "recompute": how,
                "sequence_parallel": shared,
            }
            tried = with_parallel(config, **keys, **options)
            layout, problems = examine(tried, 4)
            if layout is not None and not problems:
                yield judge(tried, layout, machine)


def test_a_model_that_fits_nowhere_is_given_the_smallest_worlds_that_hold_it():
    config = load_run(RUNS / "llama-1b.yaml", LARGE)
    advice = advise(config, make_plan(config, 2), cluster("h100-80gb", 2, 8))
    assert not any(candidate.fits for candidate in advice.ranked)
    offloaded, plain = advice.larger
    assert (offloaded.parallel.offload, plain.parallel.offload) == ("optimizer", "none")
    assert offloaded.fits
    assert plain.fits
    assert 2 < offloaded.layout.world_size < plain.layout.world_size
    for one, half_offload in ((offloaded, "none"), (plain, "optimizer")):
        half = Cluster(advice.cluster.accelerator, one.layout.world_size // 2, 8)
        best = rank(config, half)[0]
        assert not best.fits or best.parallel.offload == half_offload == "optimizer"
    assert larger_worlds(config, cluster("a100-40gb", 1, 8), 1) == []
    assert [one["layout"]["data"] for one in advice.as_json(config)["larger"]] == [
        one.layout.data for one in advice.larger
    ]


def test_where_nothing_fits_the_offload_that_does_is_named():
    """7B parameters on one GPU: 18 bytes for each are 120 GiB, 6 with the optimizer's state on the host are 40."""
    config = load_run(RUNS / "llama-7b.yaml", [])
    alone = cluster("h100-80gb", 1, 8)
    advice = advise(config, make_plan(config, 1), alone)
    best = advice.ranked[0]
    assert best.fits
    assert best.parallel.offload == "optimizer"
    assert "offload optimizer" in str(best)
    assert best.memory_bytes < 80 * GIB < judge(config, best.layout, alone).memory_bytes
    assert 12 * 7e9 < best.host_bytes <= alone.accelerator.host_memory_bytes
    assert advice.as_json(config)["ranked"][0]["offload"] == "optimizer"
    assert [one.parallel.offload for one in advice.larger] == ["none"], "where it would fit without"
    fitting = load_run(RUNS / "gpt2-124m.yaml", ["parallel.offload=optimizer", "parallel.zero_stage=1"])
    advice = advise(fitting, make_plan(fitting, 1), alone)
    assert advice.planned.parallel.offload == "optimizer"
    assert {one.parallel.offload for one in advice.ranked if one.fits} == {"none"}, "it is slower, and not needed"
    assert advice.larger == ()


@pytest.mark.parametrize(("gpu", "without"), [("h100-80gb", 32), ("h200-141gb", 16)])
def test_70b_parameters_on_8_gpus_fit_with_offload(gpu: str, without: int):
    """18 bytes of state are 145 GiB per GPU; 6 are 48, with activations that recomputation makes small enough."""
    config = load_run(RUNS / "llama-70b.yaml", [])
    advice = advise(config, make_plan(config, 8), cluster(gpu, 8, 8))
    best = advice.ranked[0]
    assert best.fits
    assert best.parallel.offload == "optimizer"
    assert best.parallel.recompute != "none"
    assert [(one.layout.world_size, one.parallel.offload) for one in advice.larger] == [(without, "none")]


@pytest.mark.parametrize(
    ("memory_gib", "host_gib", "lack"),
    [
        (30, 256, r"^what training holds beside activations needs 44\.4 of 30 GiB$"),
        (46, 256, r"^needs \d+(\.\d+)? of 46 GiB$"),
        (80, 128, r"^needs 188 of 128 GiB of host memory per GPU$"),
        (30, 128, r"^what training .* of 30 GiB and needs 188 of 128 GiB of host memory per GPU$"),
    ],
    ids=["states", "activations", "host", "both"],
)
def test_what_does_not_fit_says_what_it_lacks(memory_gib: int, host_gib: int, lack: str):
    """6.7 billion parameters on one GPU: 6 bytes of each are 37.7 GiB, a tenth more and 3 GiB are reserved; on the host
    18 and, while a save goes on, 12 more are 188 GiB."""
    alone = cluster("h100-80gb", 1, 8)
    accelerator = replace(alone.accelerator, memory_bytes=memory_gib * GIB, host_memory_bytes=host_gib * GIB)
    nearest = rank(load_run(RUNS / "llama-7b.yaml", []), replace(alone, accelerator=accelerator))[0]
    assert not nearest.fits
    assert re.search(lack, nearest.lack())


def test_an_unknown_accelerator_is_named():
    with pytest.raises(ConfigError, match=r"--gpu v100 is not known(.|\n)*h100-80gb"):
        cluster("v100", 1, 8)
