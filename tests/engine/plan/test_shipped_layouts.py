"""The layouts of `configs/parallel` for the models of `configs/runs`: each fits, or the plan says why none does."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.load import load_run
from engine.config.resolve import resolve
from engine.plan.hardware import cluster
from engine.plan.parameters import num_parameters
from engine.plan.ranking import judge, larger_worlds, rank

CONFIGS = Path(__file__).parents[3] / "configs"
WORLDS = (1, 8, 64, 512)
PER_NODE = 8
GPU = "h100-80gb"
TOO_SMALL = [("llama-70b", 1)]
"""Worlds that no layout fits."""
OFFLOADED = [("llama-7b", 1), ("llama-70b", 8)]
"""Worlds that only layouts with the optimizer's state in host memory fit."""
MODELS = sorted(path.stem for path in (CONFIGS / "runs").glob("*.yaml"))
"""Models with a run file; the other published sizes are there to start from (`init_from`)."""


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_layout_that_fits_80_gb_or_none_does(model: str, world_size: int) -> None:
    path = CONFIGS / "parallel" / f"{model}-{world_size}.yaml"
    assert path.exists() == ((model, world_size) not in TOO_SMALL)
    if path.exists():
        run = load_run(path)
        machine = cluster(GPU, world_size, PER_NODE)
        assert run.name == model
        assert judge(run, resolve(run, world_size), machine).fits
        assert run.parallel.tensor <= PER_NODE, "tensor parallelism stays inside a node"
        assert (run.parallel.offload != "none") == ((model, world_size) in OFFLOADED)


def test_no_file_is_left_over() -> None:
    found = {path.stem for path in (CONFIGS / "parallel").glob("*.yaml")}
    assert found <= {f"{model}-{world_size}" for model in MODELS for world_size in WORLDS}


@pytest.mark.parametrize(("model", "world_size"), TOO_SMALL)
def test_what_has_no_layout_cannot_have_one(model: str, world_size: int) -> None:
    """At the least 2 bytes of a weight and 4 of its gradient, each held once."""
    run = load_run(CONFIGS / "runs" / f"{model}.yaml")
    machine = cluster(GPU, world_size, PER_NODE)
    assert 6 * num_parameters(run.model) / world_size > machine.accelerator.memory_bytes


@pytest.mark.parametrize(("model", "world_size"), OFFLOADED)
def test_what_is_offloaded_would_not_fit_without(model: str, world_size: int) -> None:
    """12 bytes more for the optimizer's state."""
    run = load_run(CONFIGS / "runs" / f"{model}.yaml")
    machine = cluster(GPU, world_size, PER_NODE)
    assert 18 * num_parameters(run.model) / world_size > machine.accelerator.memory_bytes


def test_where_nothing_fits_the_plan_names_the_smallest_world() -> None:
    run = load_run(CONFIGS / "runs" / "llama-70b.yaml")
    assert not any(candidate.fits for candidate in rank(run, cluster(GPU, 1, PER_NODE)))
    larger = larger_worlds(run, cluster(GPU, 1, PER_NODE), largest=32)
    assert [(one.layout.world_size, one.parallel.offload) for one in larger] == [(8, "optimizer"), (32, "none")]
