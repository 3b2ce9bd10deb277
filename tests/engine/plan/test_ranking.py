"""Ranking: everything proposed can start and fits, the order is that of the estimate, and the reasons add up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.load import load_run
from engine.config.resolve import examine
from engine.errors import ConfigError
from engine.plan.hardware import Cluster, cluster
from engine.plan.plan import make_plan, stage_plans
from engine.plan.ranking import FRAGMENTED_SHARE, RESERVED_BYTES, advise, judge, rank, smallest_world
from engine.plan.worlds import with_parallel

RUNS = Path(__file__).parents[3] / "configs" / "runs"
LARGE = [
    "model.num_layers=80",
    "model.hidden_size=8192",
    "model.num_heads=64",
    "model.num_kv_heads=8",
    "model.ffn_size=28672",
]


def test_what_is_proposed_can_start_and_fits_and_comes_fastest_first():
    config = load_run(RUNS / "llama-1b.yaml", [])
    ranked = rank(config, cluster("a100-40gb", 16, 8))
    fitting = [candidate for candidate in ranked if candidate.fits]
    assert len(fitting) > 5
    assert any(candidate.parallel.virtual_stages > 1 for candidate in fitting)
    assert all(candidate.parallel.virtual_stages == 1 for candidate in ranked if candidate.layout.pipe == 1)
    for candidate in fitting:
        tried = config.model_copy(update={"parallel": candidate.parallel})
        layout, problems = examine(tried, 16)
        assert problems == []
        assert layout == candidate.layout
        fullest = max(stage.memory.total for stage in stage_plans(tried, candidate.layout))
        assert fullest * (1 + FRAGMENTED_SHARE) + RESERVED_BYTES <= 40 * 2**30
        assert candidate.layout.tensor <= 8, "tensor parallelism stays inside a node"
    seconds = [candidate.time.total for candidate in fitting]
    assert seconds == sorted(seconds)
    assert [candidate.fits for candidate in ranked] == sorted((c.fits for c in ranked), reverse=True)


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
    sparing = [candidate for candidate in ranked if candidate.fits and candidate.spares]
    assert {candidate.parallel.recompute for candidate in sparing} >= {"none", "selective", "full"}
    assert any(candidate.parallel.sequence_parallel for candidate in sparing)
    for candidate in sparing:
        assert candidate.memory_bytes <= 80 * 2**30 < candidate.plain_bytes
        assert f"{candidate.plain_bytes / 2**30:.0f} GiB if plain" in candidate.why(ranked[0])
    whole = next(candidate for candidate in sparing if candidate.parallel.recompute == "full")
    assert whole.time.recompute == pytest.approx(whole.time.arithmetic / 3, rel=0.1), "a forward pass once more"
    selective = next(candidate for candidate in sparing if candidate.parallel.recompute == "selective")
    assert 0 < selective.time.recompute < selective.time.arithmetic / 20
    plain = next(candidate for candidate in ranked if candidate.fits and not candidate.spares)
    assert "if plain" not in plain.why(ranked[0])


@pytest.mark.parametrize("gpu", ["a100-40gb", "h100-80gb"])
def test_no_other_form_of_a_layout_is_faster_than_the_best(gpu: str):
    """Every combination of what is tried, one by one, on a machine that holds little."""
    config, machine = (
        load_run(RUNS / "llama-1b.yaml", ["model.num_layers=8", "stages.0.sequence_length=2048"]),
        cluster(gpu, 4, 2),
    )
    found = rank(config, machine)[0]
    fastest = float("inf")
    for pipe, tensor, zero_stage in itertools.product((1, 2, 4), (1, 2), range(4)):
        for size, chunks, how, shared in itertools.product(
            (1, 2, 4, 8, 16, 32, 64), (1, 2, 4), ("none", "selective", "full"), (False, True)
        ):
            keys = {"pipe": pipe, "tensor": tensor, "data": 4 // (pipe * tensor) or 1, "zero_stage": zero_stage}
            options = {
                "micro_batch_size": size,
                "virtual_stages": chunks,
                "recompute": how,
                "sequence_parallel": shared,
            }
            tried = with_parallel(config, **keys, **options)
            layout, problems = examine(tried, 4)
            if layout is not None and not problems and (candidate := judge(tried, layout, machine)).fits:
                fastest = min(fastest, candidate.time.total)
    assert found.time.total == pytest.approx(fastest, rel=0.01)


def test_a_model_that_fits_nowhere_is_given_the_smallest_world_that_holds_it():
    config = load_run(RUNS / "llama-1b.yaml", LARGE)
    alone = cluster("h100-80gb", 8, 8)
    assert not rank(config, alone)[0].fits
    found = smallest_world(config, alone, 512)
    assert found is not None
    assert found.fits
    half = Cluster(alone.accelerator, found.layout.world_size // 2, 8)
    assert not rank(config, half)[0].fits
    assert smallest_world(config, cluster("a100-40gb", 1, 8), 1) is None


def test_where_nothing_fits_the_offload_that_does_is_named():
    """7B parameters on one GPU: 18 bytes for each are 120 GiB, 6 with the optimizer's state on the host are 40."""
    config = load_run(RUNS / "llama-7b.yaml", [])
    alone = cluster("h100-80gb", 1, 8)
    advice = advise(config, make_plan(config, 1), alone)
    assert not any(candidate.fits for candidate in advice.ranked)
    assert advice.offloaded is not None
    assert advice.offloaded.fits
    assert advice.offloaded.parallel.offload == "optimizer"
    assert "offload optimizer" in str(advice.offloaded)
    assert advice.offloaded.memory_bytes < 80 * 2**30 < advice.ranked[0].memory_bytes
    assert 12 * 7e9 < advice.offloaded.host_bytes <= alone.accelerator.host_memory_bytes
    assert advice.as_json()["offloaded"]["offload"] == "optimizer"
    assert advice.larger is not None
    small = replace(alone, accelerator=replace(alone.accelerator, host_memory_bytes=64 * 2**30))
    assert advise(config, make_plan(config, 1), small).offloaded is None, "the host has to hold it"
    fitting = load_run(RUNS / "gpt2-124m.yaml", [])
    assert advise(fitting, make_plan(fitting, 1), alone).offloaded is None


def test_an_unknown_accelerator_is_named():
    with pytest.raises(ConfigError, match=r"--gpu v100 is not known(.|\n)*h100-80gb"):
        cluster("v100", 1, 8)
